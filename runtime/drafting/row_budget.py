"""Chooses how many rows the next step verifies, and whether the heads run in it.

Unit of time: a plain step, which emits one token. A step of n rows takes the n with the largest
``expected tokens(n) − throughput · cost(n)``, and the heads run while the tokens that their candidates lately added to a step,
the cost of their rows subtracted, exceed ``throughput · cost of the heads``. This is Dinkelbach's algorithm for the largest ratio
of two sums, tokens ÷ time: with the best throughput in the rule, the rule gives the best throughput.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .acceptance_stats import AcceptanceStats
from .adaptive import AdaptiveDrafter
from .draft import Candidates, Draft, Drafter
from .lookup import PromptLookup
from .step_cost import StepCost, Track

if TYPE_CHECKING:
    from ..files.heads import PlattScaling

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Numbers of rows to choose from where the engine takes any."""

_UNTESTED, _MEASURED = 0.5, 2.0
"""Weight of the heads' own probabilities before they were put to the test: without, and with, a measurement of the heads."""

_LEAST_CHANCE = 0.01
_SHOWN = 16
_SOONEST, _LATEST = 4, 64
"""Plain steps between two looks at the heads' candidates."""


class DraftStats(Protocol):
    """Statistics of a generation, as far as the choice of rows appears in them."""

    steps: int
    probes: int
    trust: list[float] | None
    costs: dict[str, float] | None


class Drafting(Protocol):
    """A sequence, as far as drafting looks at it. ``on_host``: whether its tokens are chosen from logits on the host."""

    drafter: Drafter
    candidates: Candidates | None
    draft: Draft
    """The rows that its newest step verified."""

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        ...

    @property
    def on_host(self) -> bool:
        """Whether its tokens are chosen from logits on the host."""
        ...

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        ...

    @property
    def stats(self) -> DraftStats:
        """Statistics of the generation."""
        ...


class RowBudget:
    """Chooses for the sequences that leave their rows open; owned by a session, one step at a time."""

    def __init__(self, sizes: tuple[int, ...], num_heads: int, scaling: PlattScaling, *, padded: bool = False) -> None:
        """``sizes``: the numbers of rows to choose from, ascending from 1. ``scaling``: of each head.

        ``padded``: all sequences of a step get the same number of rows. Otherwise each sequence's rows are chosen alone.
        """
        self._num_heads, self._scaling, self._padded = num_heads, scaling, padded
        # Steps of which the host decides the outcome have other costs: logits leave the engine, heads are a call of their own.
        self._costs = {on_host: StepCost(sizes) for on_host in (False, True)}
        self.stats = AcceptanceStats(num_heads + 1, weight=_MEASURED if scaling else _UNTESTED)
        self._wait, self._waited = _SOONEST, 0
        self._together: list[Drafting] = []
        self._track = Track()

    def drafter(self, lookup: PromptLookup | None, *, on_host: bool) -> AdaptiveDrafter:
        """Make the drafter of a new request."""
        cost = self._costs[on_host]
        known = cost.to_measure(Track()) is None
        heads = known and self.stats.heads_gain() > self.stats.throughput() * cost.heads
        return AdaptiveDrafter(self._scaling, self._num_heads, lookup, self.stats, heads=heads)

    def choose(self, sequences: Sequence[Drafting]) -> None:
        """Set ``rows`` and ``heads`` of every open drafter for the next step of ``sequences``."""
        if self._padded:
            if len(sequences) != len(self._together) or any(a is not b for a, b in zip(sequences, self._together, strict=True)):
                self._together, self._track = list(sequences), Track()
            self._choose_together(sequences)
        else:
            for sequence in sequences:
                self._choose_together([sequence])

    def learn(self, sequences: Sequence[Drafting], emitted: Sequence[list[int]], seconds: Sequence[float]) -> None:
        """Learn from the chosen step: the tokens that each sequence emitted, and the seconds that its engine call took."""
        if self._padded:
            self._learn_together(sequences, emitted, max(seconds, default=0.0))
        else:
            for sequence, tokens, taken in zip(sequences, emitted, seconds, strict=True):
                self._learn_together([sequence], [tokens], taken)

    def _choose_together(self, sequences: Sequence[Drafting]) -> None:
        """Choose one number of rows for the open drafters of sequences that share an engine call."""
        open_ones = [(s, s.drafter) for s in sequences if isinstance(s.drafter, AdaptiveDrafter)]
        if not open_ones:
            return
        drafters = [drafter for _, drafter in open_ones]
        cost = self._cost(sequences)
        fixed = [s.drafter for s in sequences if not isinstance(s.drafter, AdaptiveDrafter)]
        each = [drafter.stats.throughput() for drafter in drafters]
        throughput = sum(each)
        least = max(throughput * cost.least_slope, _LEAST_CHANCE) if len(sequences) == 1 else _LEAST_CHANCE
        if cost.to_measure(self._track_of(drafters)) is not None:
            least = 0.0  # rows that don't pay show what rows cost
        goes_on = False
        for (sequence, drafter), own in zip(open_ones, each, strict=True):
            by_lookup = drafter.rank(sequence.candidates, sequence.remaining - 1, cost.sizes[-1] - 1, least)
            if drafter.has_candidates:
                gain = _best(drafter.expected, own, cost)[1] - _best(by_lookup, own, cost)[1]
                for stats in (self.stats, drafter.stats):
                    stats.expect(min(max(gain, 0.0), 1.0))
            goes_on = goes_on or sequence.remaining > 1
        rows, heads, probing = self._choose(drafters, throughput, cost, goes_on=goes_on, alone=not fixed)
        rows = max([rows, *(drafter.rows for drafter in fixed)])
        heads = heads or any(drafter.heads for drafter in fixed)
        for drafter in drafters:
            drafter.rows, drafter.heads, drafter.probing = rows, heads, probing

    def _choose(
        self, drafters: list[AdaptiveDrafter], throughput: float, cost: StepCost, *, goes_on: bool, alone: bool
    ) -> tuple[int, bool, bool]:
        """Return the rows, whether heads run, and whether they run only to see what they would propose."""
        longest = max(len(drafter.expected) for drafter in drafters)
        drafted = any(drafter.has_candidates for drafter in drafters)
        measured = cost.to_measure(self._track_of(drafters), longest) if drafted else cost.to_measure(self._track_of(drafters))
        if measured is not None and goes_on and alone:
            rows, heads = measured
            return rows if drafted else 1, heads, False
        expected = drafters[0].expected if len(drafters) == 1 else [
            sum(drafter.expected[min(rows, len(drafter.expected) - 1)] for drafter in drafters) for rows in range(longest)
        ]
        rows, _ = _best(expected, throughput, cost)
        if not goes_on:
            return rows, False, False
        if sum(drafter.stats.heads_gain() for drafter in drafters) > throughput * cost.heads:
            return rows, True, False
        probing = self._waited >= self._wait
        return rows, probing, probing

    def _learn_together(self, sequences: Sequence[Drafting], emitted: Sequence[list[int]], seconds: float) -> None:
        pairs = zip(sequences, emitted, strict=True)
        open_ones = [(s, s.drafter, tokens) for s, tokens in pairs if isinstance(s.drafter, AdaptiveDrafter)]
        if not open_ones:
            return
        cost = self._cost(sequences)
        heads = open_ones[0][1].heads
        # Fewer rows ran than were chosen where there were no candidates for more.
        rows = max(sequence.draft.shape.rows for sequence in sequences)
        if self._padded:
            rows = next(size for size in cost.sizes if size >= rows)
        taken = cost.of(rows, heads)
        cost.observe(rows, heads, seconds, self._track_of([drafter for _, drafter, _ in open_ones]))
        for sequence, drafter, tokens in open_ones:
            evidence = drafter.tested(tokens, taken)
            self.stats.learn(evidence)
            drafter.stats.learn(evidence)
            sequence.stats.probes += drafter.probing
            if sequence.done or sequence.stats.steps % _SHOWN == 1:
                sequence.stats.trust = [round(factor, 3) for factor in drafter.stats.calibration()]
                sequence.stats.costs = cost.shown()
        self._waited = 0 if heads else self._waited + 1
        guesses = [drafter.guessed(tokens[0]) for _, drafter, tokens in open_ones if drafter.has_candidates]
        if guesses and not heads:  # this step could see what a probe brought
            self._wait = max(self._wait // 2, _SOONEST) if any(guesses) else min(self._wait * 2, _LATEST)

    def _track_of(self, drafters: list[AdaptiveDrafter]) -> Track:
        return self._track if self._padded else drafters[0].track

    def _cost(self, sequences: Sequence[Drafting]) -> StepCost:
        return self._costs[any(sequence.on_host for sequence in sequences)]


def _best(expected: list[float], throughput: float, cost: StepCost) -> tuple[int, float]:
    """Return the size with the largest ``expected − throughput · (cost − 1)``, the smallest of equals, and that value."""
    best, most = 1, 0.0
    last = len(expected) - 1
    for size, taken in zip(cost.sizes, cost.curve, strict=True):
        value = expected[min(size - 1, last)] - throughput * (taken - 1)
        if value > most:
            best, most = size, value
    return best, most
