"""Recorded answers decoded anew, step by step, with candidates that may depend on the path before them. No engine runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from medusa_deploy.calibration.hit_rates import Hits
from medusa_deploy.runtime.drafting.draft import Scale, TokenPath
from medusa_deploy.runtime.drafting.hits import MISS, NO_LABEL
from medusa_deploy.runtime.drafting.lookup import PromptLookup
from medusa_deploy.runtime.files.heads import PlattScaling

_NEVER = -30.0
Row = tuple[list[int], list[float]]
"""Candidates, best first: tokens, and log-probabilities or chances."""


class Proposer(Protocol):
    """What heads propose at a position of the recorded answers, behind a path of drafted tokens."""

    def candidates(self, position: int, path: TokenPath) -> Row:
        """With log-probabilities; none where the path holds what the heads can't propose."""
        ...


class Chances(Protocol):
    """The candidates at one position."""

    def behind(self, path: TokenPath) -> Row:
        """With their chances to be right where the path is."""
        ...


class Recorded(NamedTuple):
    """One answer: the prompt's tokens, its own, and the position of the first of them among those of all answers."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    first: int


class _Asked:
    """:class:`Chances` of what a proposer says of its candidates; each row is computed once."""

    def __init__(self, proposer: Proposer, position: int, scales: Sequence[Scale]) -> None:
        self._proposer, self._position, self._scales = proposer, position, scales
        self._rows: dict[TokenPath, Row] = {}

    def behind(self, path: TokenPath) -> Row:
        if path not in self._rows:
            tokens, log_probs = self._proposer.candidates(self._position, path)
            chances = self._scales[len(path)].chances(np.array([log_probs])) if tokens else [[]]
            self._rows[path] = tokens, chances[0]
        return self._rows[path]


def likeliest(asked: Chances, heads: int, count: int, continuation: Sequence[tuple[int, float]]) -> list[TokenPath]:
    """As :func:`medusa_deploy.runtime.drafting.draft.ranked_paths`, with candidates that may be others behind every path."""
    found: dict[TokenPath, float] = {}
    waiting: list[tuple[float, int, int, float, TokenPath]] = [(-asked.behind(())[1][0], 0, 0, 1.0, ())]
    while waiting and len(found) < count:
        negative, depth, rank, of_parent, parent = heapq.heappop(waiting)
        tokens, chances = asked.behind(parent)
        path = (*parent, tokens[rank])
        found[path] = -negative
        if rank + 1 < len(tokens):
            heapq.heappush(waiting, (-of_parent * chances[rank + 1], depth, rank + 1, of_parent, parent))
        if depth + 1 < heads and len(found) < count and (below := asked.behind(path)[1]):
            heapq.heappush(waiting, (negative * below[0], depth + 1, 0, -negative, path))
    so_far: TokenPath = ()
    chance = 1.0
    for token, rate in continuation:
        tokens, chances = asked.behind(so_far) if chance else ([], [])
        chance *= chances[tokens.index(token)] if token in tokens else 0.0
        so_far = (*so_far, token)
        found[so_far] = 1 - (1 - chance) * (1 - rate)
    return sorted(found, key=lambda path: (-found[path], len(path)))[:count]


def replay(answer: Recorded, proposer: Proposer, scaling: PlattScaling, rows: int, *, lookup: bool) -> tuple[int, int]:
    """Tokens emitted and steps taken, of ``rows`` rows each, where drafts are accepted as decoding the answer would."""
    tokens, heads = list(answer.tokens), len(scaling)
    scales = [Scale((pair,)) for pair in scaling]
    text = [*answer.prompt, tokens[0]]
    repeats = PromptLookup(text) if lookup else None
    at = steps = 0
    while at < len(tokens) - 1:
        continuation = repeats.continuation(heads) if repeats is not None else []
        asked = _Asked(proposer, answer.first + at, scales)
        drafted = set(likeliest(asked, heads, rows - 1, continuation))
        emitted = 1
        while tuple(tokens[at + 1 : at + 1 + emitted]) in drafted and at + 1 + emitted < len(tokens):
            emitted += 1
        text += tokens[at + 1 : at + 1 + emitted]
        at, steps = at + emitted, steps + 1
    return len(tokens) - 1, steps


def path_hits(proposer: Proposer, labels: np.ndarray) -> Hits:
    """Where heads are right behind the tokens that came, as long as these were candidates; elsewhere ``NO_LABEL``.

    ``labels`` int64 [n, K] of all positions, negative past an answer's end.
    """
    count, heads = labels.shape
    width = len(proposer.candidates(0, ())[0])
    hits = Hits(np.full((count, heads), NO_LABEL), np.full((count, heads, width), _NEVER, np.float32))
    for position, row in enumerate(labels.tolist()):
        for head, label in enumerate(row):
            if label < 0:
                break
            tokens, log_probs = proposer.candidates(position, tuple(row[:head]))
            hits.log_probs[position, head, : len(tokens)] = log_probs
            hits.ranks[position, head] = tokens.index(label) if label in tokens else MISS
            if label not in tokens:
                break
    return hits


def halves(answers: Sequence[Recorded]) -> Iterator[tuple[Sequence[Recorded], slice]]:
    """Both halves of the answers, each with the positions of the other half."""
    middle = len(answers) // 2
    border = answers[middle].first
    yield answers[:middle], slice(border, None)
    yield answers[middle:], slice(0, border)


def tokens_per_step(
    answers: Sequence[Recorded], proposer: Proposer, scalings: Sequence[PlattScaling], rows: int, *, lookup: bool
) -> float:
    """Over all answers; ``scalings``: of the two :func:`halves`."""
    pairs = [
        replay(answer, proposer, scaling, rows, lookup=lookup)
        for (half, _), scaling in zip(halves(answers), scalings, strict=True)
        for answer in half
    ]
    return sum(tokens for tokens, _ in pairs) / sum(steps for _, steps in pairs)
