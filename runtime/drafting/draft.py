"""Drafts: the rows that a step verifies below the root."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..tree import ROOT_ONLY, Shape, Tree
from .lookup import PromptLookup

if TYPE_CHECKING:
    from ..files.heads import PlattScaling
    from .guide import Guide

UNKNOWN_SCALING = ((0.7, -1.0),)
"""Scaling of heads that nobody measured. Both sets of heads in the repository were surer than right."""

_SMALLEST = 1e-6
_LEAST_LIKELY = -math.log1p(1 / _SMALLEST)
"""Odds against a candidate are cut off at ``_SMALLEST`` and 1/``_SMALLEST``. The latter belong to this log-probability."""

_HOPELESS = 700.0
"""Largest logarithm of odds against: its exponential is still a float."""

TokenPath = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """Rows of one sequence in one step. ``tokens`` int64 [N - 1]: all rows' but the root's.

    ``looked_up``: whether repeated text was among the sources that the rows were chosen from.
    """

    shape: Shape
    tokens: np.ndarray
    looked_up: bool = False


NOTHING = Draft(ROOT_ONLY, np.zeros(0, np.int64))
"""The root alone, as in plain decoding."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The heads' candidates at the root's row: ``tokens`` int64 [K, k] and ``log_probs`` float32 [K, k], best first."""

    tokens: np.ndarray
    log_probs: np.ndarray


class Drafter(Protocol):
    """Drafts for one sequence; a step of one row, the root, needs no candidates."""

    @property
    def rows(self) -> int:
        """N of the next step."""
        ...

    @property
    def heads(self) -> bool:
        """Whether the next step must bring candidates for the one after it."""
        ...

    def draft(self, candidates: Candidates | None) -> Draft:
        """Return the rows of the next step."""
        ...


class WrappedDrafter:
    """Asks for what ``drafter`` asks for; a subclass checks or changes its drafts."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    @property
    def rows(self) -> int:
        """N of the next step."""
        return self._drafter.rows

    @property
    def heads(self) -> bool:
        """Whether the next step must bring candidates."""
        return self._drafter.heads


@dataclass(frozen=True, slots=True)
class FixedTree:
    """Puts the candidates on the same tree in every step (arXiv 2401.10774, section 2.1.2)."""

    tree: Tree

    @property
    def rows(self) -> int:
        """N of every step."""
        return self.tree.rows

    @property
    def heads(self) -> bool:
        """Whether there are rows to fill."""
        return self.rows > 1

    def draft(self, candidates: Candidates | None) -> Draft:
        """Return the tree, filled."""
        if self.rows == 1:
            return NOTHING
        assert candidates is not None
        return Draft(self.tree, candidates.tokens[self.tree.slots[0], self.tree.slots[1]])


class BestRows:
    """Takes the most promising rows, by the heads' probabilities and by repeated text. Their number stays the same."""

    def __init__(
        self, rows: int, scaling: PlattScaling, lookup: PromptLookup | None = None, guide: Guide | None = None
    ) -> None:
        """``rows``: N, the root included. ``scaling``: Platt scaling of each head. ``guide``: to a grammar, if there is one."""
        self.rows = rows
        self.heads = rows > 1
        self._lookup, self._guide = lookup, guide
        self._scale = Scale(scaling)

    def draft(self, candidates: Candidates | None) -> Draft:
        """Return the N − 1 paths that are most likely right."""
        if self.rows == 1:
            return NOTHING
        assert candidates is not None
        continuation = self._lookup.continuation() if self._lookup is not None else []
        tokens, chances = candidates.tokens.tolist(), self._scale.chances(candidates.log_probs)
        rank = ranked_paths if self._guide is None else self._guide.ranked_paths
        paths = rank(tokens, chances, continuation, self.rows - 1)
        return compiled([path for path, _ in paths], looked_up=bool(continuation))


class Scale:
    """Platt scaling: from a candidate's log-probability to the rate at which it is right behind right tokens."""

    def __init__(self, scaling: PlattScaling) -> None:
        self._scaling = scaling or UNKNOWN_SCALING

    def chances(self, log_probs: np.ndarray) -> list[list[float]]:
        """Return probabilities [K][k]; they fall with the rank. NaN becomes the smallest one: verification reports it."""
        scaling = self._scaling if len(self._scaling) > 1 else self._scaling * len(log_probs)
        # Plain floats: an engine call leaves numpy's code in no cache, and a dozen array operations take longer than 40 numbers.
        return [_scaled(row, *pair) for row, pair in zip(log_probs.tolist(), scaling, strict=False)]


def _scaled(log_probs: list[float], slope: float, offset: float) -> list[float]:
    chances = []
    for log_prob in log_probs:
        against = math.exp(-log_prob) - 1 if log_prob > _LEAST_LIKELY else 1 / _SMALLEST  # (1 - p) / p
        scaled = slope * math.log(max(against, _SMALLEST)) - offset
        chances.append(1 / (1 + math.exp(min(scaled, _HOPELESS))))
    return chances


def ranked_paths(
    tokens: list[list[int]],
    chances: list[list[float]],
    continuation: list[tuple[int, float]],
    count: int,
    least: float = 0.0,
) -> list[tuple[TokenPath, float]]:
    """Return the ``count`` paths that are most likely right, best first, with their probabilities; closed under prefixes.

    ``tokens`` and ``chances`` [K][k]: each head's candidates, and their probabilities behind right tokens; [] without heads.
    ``continuation``: repeated text, with the probability of each prefix. Paths of the heads below ``least`` are left out.
    """
    paths = _best_paths(tokens, chances, count, least)
    if not continuation:
        return list(paths.items())
    so_far: TokenPath = ()
    chance = 1.0 if tokens else 0.0
    for depth, (token, rate) in enumerate(continuation):
        so_far = (*so_far, token)
        known = depth < len(tokens) and token in tokens[depth]
        chance *= chances[depth][tokens[depth].index(token)] if known else 0.0
        paths[so_far] = 1 - (1 - chance) * (1 - rate)  # right unless both are wrong
    # Chances never rise along a path, so the best paths, shorter ones first among equals, are closed under prefixes.
    return sorted(paths.items(), key=lambda item: (-item[1], len(item[0])))[:count]


def _best_paths(
    tokens: list[list[int]], chances: list[list[float]], count: int, least: float
) -> dict[TokenPath, float]:
    """Return the ``count`` likeliest paths of candidates, best first, with their probabilities; all if there are fewer."""
    found: dict[TokenPath, float] = {}
    # Open paths as (-chance, depth, rank, chance of the parent, tokens of the parent).
    waiting: list[tuple[float, int, int, float, TokenPath]] = [(-chances[0][0], 0, 0, 1.0, ())] if tokens else []
    while waiting and len(found) < count:
        negative, depth, rank, of_parent, parent = heapq.heappop(waiting)
        if -negative < least:
            break
        path = (*parent, tokens[depth][rank])
        found[path] = -negative
        if rank + 1 < len(tokens[depth]):
            heapq.heappush(waiting, (-of_parent * chances[depth][rank + 1], depth, rank + 1, of_parent, parent))
        if depth + 1 < len(tokens):
            heapq.heappush(waiting, (negative * chances[depth + 1][0], depth + 1, 0, -negative, path))
    return found


def compiled(paths: list[TokenPath], *, looked_up: bool) -> Draft:
    """Make rows in breadth order of prefix-closed paths of tokens."""
    if not paths:
        return Draft(ROOT_ONLY, NOTHING.tokens, looked_up)
    paths.sort(key=len)
    row_of = {path: row for row, path in enumerate([(), *paths])}
    shape = Shape.of((-1, *[row_of[path[:-1]] for path in paths]))
    return Draft(shape, np.array([path[-1] for path in paths], np.int64), looked_up)
