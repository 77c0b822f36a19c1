"""Acceptance on the host, from logits. For plain argmax the graph accepts by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import GrammarError, NumericsError
from ..grammar import Matcher
from ..request import TokenLogprob
from ..sampling import SamplingParams, draw, log_probabilities, scores, uniform, weights

_ENTROPY_FLOOR = 1e-5
"""Added to probabilities inside the entropy's logarithm, as in the reference."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """``path``: the accepted rows from below the root down. ``tokens``: their tokens, then the one that follows them."""

    path: tuple[int, ...]
    tokens: list[int]


def accept(
    params: SamplingParams,
    parents: np.ndarray,
    tokens: np.ndarray,
    logits: np.ndarray,
    history_tokens: Sequence[int],
    prompt_length: int,
    matcher: Matcher | None = None,
) -> Acceptance:
    """Walk the tree with the backbone's logits.

    ``parents`` int64 [N]: row to parent row, parents before children. ``tokens`` int64 [≥ N] and ``logits`` [≥ N, V]: each row's.
    The root's token is the last of ``history_tokens``, the first ``prompt_length`` of which are the prompt. Rows past N are
    padding: nothing reads them. ``matcher``: stands in a grammar behind the history; its masks come after bias and penalties,
    before temperature and filters.

    Raises:
        GrammarError: the grammar allows no token at the root.
        NumericsError: the root, or in the mode typical any visited row, holds NaN or infinite logits. Other rows that do aren't
            accepted: their token is emitted and becomes the next root.
    """
    step = _Step(params, parents, tokens, logits, list(history_tokens), prompt_length, matcher)
    if params.mode == "typical":
        return step.typical()
    return step.match(step.most_likely if params.mode == "greedy" else step.drawn)


def token_logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """Return the log-probability of ``token`` by one row of logits [V], and the ``count`` most likely tokens with theirs."""
    log_probs = log_probabilities(logits)
    count = min(count, len(log_probs))
    top = np.argpartition(-log_probs, count - 1)[:count] if count else np.empty(0, np.int64)
    top = top[np.lexsort((top, -log_probs[top]))]
    return TokenLogprob(token, float(log_probs[token]), tuple(zip(top.tolist(), log_probs[top].tolist(), strict=True)))


@dataclass(frozen=True, slots=True)
class _Step:
    """One sequence's rows of one step."""

    params: SamplingParams
    parents: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray
    history: list[int]
    prompt_length: int
    matcher: Matcher | None

    def match(self, choose: Callable[[int, list[int]], int]) -> Acceptance:
        """Choose the next token at the current row; descend while a child carries it, else emit it and stop.

        Every emitted token is chosen from the backbone's own distribution at its row, so the draft changes how many tokens a
        step emits and never which (the argument of arXiv 2305.09781, section 4.3).
        """
        row = 0
        path: list[int] = []
        chosen: list[int] = []
        while True:
            try:
                token = choose(row, chosen)
            except (NumericsError, GrammarError):
                if not path:
                    raise
                return Acceptance(tuple(path[:-1]), chosen)  # its token is the next root, if there is one
            chosen.append(token)
            if self._finished(chosen):
                return Acceptance(tuple(path), chosen)
            matching = np.flatnonzero((self.parents == row) & (self.tokens[: len(self.parents)] == token))
            if not len(matching):
                return Acceptance(tuple(path), chosen)
            row = int(matching[0])
            path.append(row)

    def most_likely(self, row: int, before: list[int]) -> int:
        """Return the token of the largest score at ``row``; the lowest id of equal ones."""
        return int(self._scores(row, before).argmax())

    def drawn(self, row: int, before: list[int]) -> int:
        """Draw a token at ``row`` with the uniform number of its position."""
        assert self.params.seed is not None, "a request's parameters are resolved before its first step"
        position = len(self.history) + len(before)
        return draw(weights(self.params, self._scores(row, before)), uniform(self.params.seed, position))

    def typical(self) -> Acceptance:
        """Accept as Medusa does: the deepest path whose tokens are likely enough, then argmax. Ties go to the larger Σ log p.

        A token is likely enough when p > min(ε, δ·exp(-H)), with p and H those of its parent's row.
        """
        params = self.params
        paths: dict[int, tuple[int, ...]] = {0: ()}
        values: dict[int, float] = {0: 0.0}
        for row in range(len(self.parents)):
            children = np.flatnonzero(self.parents == row)
            if row not in paths or not len(children) or self._finished(self._tokens(paths[row])):
                continue
            weighed = weights(params, self._scores(row, self._tokens(paths[row])))
            probabilities = weighed / weighed.sum(dtype=np.float64)
            entropy = -float(np.sum(probabilities * np.log(probabilities + _ENTROPY_FLOOR)))
            threshold = min(params.typical_epsilon, params.typical_delta * math.exp(-entropy))
            for child in children.tolist():
                p = float(probabilities[self.tokens[child]])
                if p > threshold:
                    paths[child] = (*paths[row], child)
                    values[child] = values[row] + math.log(p)
        last = max(paths, key=lambda row: (len(paths[row]), values[row], -row))
        accepted = self._tokens(paths[last])
        if self._finished(accepted):
            return Acceptance(paths[last][:-1], accepted)
        return Acceptance(paths[last], [*accepted, self.most_likely(last, accepted)])

    def _scores(self, row: int, before: list[int]) -> np.ndarray:
        found = scores(self.params, self.logits[row], self.history + before, self.prompt_length)
        return found if self.matcher is None else _masked(found, self.matcher.allowed(before))

    def _finished(self, tokens: list[int]) -> bool:
        return bool(tokens) and self.matcher is not None and self.matcher.finished(tokens)

    def _tokens(self, path: tuple[int, ...]) -> list[int]:
        return [int(self.tokens[row]) for row in path]


def _masked(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return scores with −∞ for tokens that aren't allowed. It takes a third of the time of ``np.where``."""
    bounds: np.ndarray = (allowed.view(np.int8) - np.float32(0.5)) * np.float32(np.inf)
    np.minimum(scores, bounds, out=bounds)
    return bounds
