"""The drafter whose number of rows is chosen in every step. It ranks candidate paths, and counts how they fared."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from .acceptance_stats import AcceptanceStats, Evidence
from .draft import NOTHING, Candidates, Draft, Scale, TokenPath, compiled, ranked_paths
from .lookup import PromptLookup
from .step_cost import Track

if TYPE_CHECKING:
    from ..files.heads import PlattScaling
    from .guide import Guide

_SUREST = 0.98
"""Highest probability of a candidate, whatever its head says."""


class AdaptiveDrafter:
    """Takes the most promising rows. :class:`.row_budget.RowBudget` sets ``rows`` and ``heads`` before each step.

    A path's probability is the one of :class:`.draft.BestRows`, times the calibration of each head, and of lookup, on it.
    """

    def __init__(
        self,
        scaling: PlattScaling,
        num_heads: int,
        lookup: PromptLookup | None,
        session: AcceptanceStats,
        *,
        heads: bool,
        guide: Guide | None = None,
    ) -> None:
        """``session``: statistics to start from. ``heads``: whether the prefill must bring candidates."""
        self.rows = 1
        self.heads = heads
        self.probing = False
        self.was_tried = False
        """Whether heads ever proposed something for this request."""
        self.stats = AcceptanceStats(num_heads + 1, session)
        self.track = Track()
        self.expected: list[float] = [0.0]
        """Expected tokens by 0, 1, 2 … rows below the root."""
        self._scale, self._num_heads, self._lookup = Scale(scaling), num_heads, lookup
        self._guide = guide
        self._paths: list[TokenPath] = []
        self._candidates: list[tuple[list[int], list[float]]] = []  # of each head: tokens, and uncalibrated probabilities
        self._continuation: list[tuple[int, float]] = []

    def rank(self, candidates: Candidates | None, deepest: int, count: int, least: float) -> list[float]:
        """Rank up to ``count`` paths of at most ``deepest`` tokens. Returns the expected tokens without the heads.

        ``least``: the heads' paths of a smaller probability are left out.
        """
        *of_heads, of_lookup = self.stats.calibration()
        self._candidates, tokens, chances = [], [], []
        if candidates is not None and deepest > 0:
            self.was_tried = True
            tokens = candidates.tokens[:deepest].tolist()
            promised = self._scale.chances(candidates.log_probs[:deepest])
            self._candidates = list(zip(tokens, promised, strict=True))
            chances = [[min(p * factor, _SUREST) for p in row] for row, factor in zip(promised, of_heads, strict=False)]
        self._continuation = self._lookup.continuation(deepest) if self._lookup is not None and deepest > 0 else []
        continuation, before, rate = [], 1.0, 1.0
        for token, of_prefix in self._continuation:
            rate *= min(of_prefix / before * of_lookup, _SUREST)
            before = of_prefix
            continuation.append((token, rate))
        if self._guide is None:
            ranked = ranked_paths(tokens, chances, continuation, count, least)
            without_heads = [chance for _, chance in continuation]
        else:
            without_heads = [chance for _, chance in self._guide.ranked_paths([], [], continuation, count, least, deepest)]
            ranked = self._guide.ranked_paths(tokens, chances, continuation, count, least, deepest)
        self._paths = [path for path, _ in ranked]
        self.expected = list(accumulate([chance for _, chance in ranked], initial=0.0))
        return list(accumulate(without_heads, initial=0.0))

    def draft(self, candidates: Candidates | None) -> Draft:  # noqa: ARG002 - they were ranked before
        """Return the best of the ranked paths."""
        if self.rows == 1:
            return NOTHING
        return compiled(self._paths[: self.rows - 1], looked_up=bool(self._continuation))

    def tested(self, emitted: list[int], cost: float) -> Evidence:
        """Return how candidates fared in a step that emitted these tokens.

        Each token is right behind those before it, whether it was drafted or not. One that a grammar forces tests nobody.
        """
        tested = []
        forced = self._guide.forced if self._guide is not None else ()
        for head, ((tokens, chances), token) in enumerate(zip(self._candidates, emitted, strict=False)):
            if tuple(emitted[: head + 1]) in forced:
                continue
            # Least squares through the origin: each observation is weighted by its expectation.
            came = chances[tokens.index(token)] if token in tokens else 0.0
            tested.append((head, came, sum([chance * chance for chance in chances])))
        before = 1.0
        for place, ((guess, of_prefix), token) in enumerate(zip(self._continuation, emitted, strict=False), start=1):
            rate, before = of_prefix / before, of_prefix
            if tuple(emitted[:place]) not in forced:
                tested.append((self._num_heads, rate * (guess == token), rate * rate))
            if guess != token:
                break
        return Evidence(len(emitted), cost, tested)

    @property
    def has_candidates(self) -> bool:
        """Whether heads proposed something for the step that was ranked last."""
        return bool(self._candidates)

    def guessed(self, token: int) -> bool:
        """Whether this is the first head's best candidate."""
        return bool(self._candidates) and self._candidates[0][0][0] == token
