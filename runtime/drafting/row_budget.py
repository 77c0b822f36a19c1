"""Chooses how many rows the next step verifies, and whether the heads run in it.

Unit of time: a plain step, which emits one token. A step of n rows takes the n with the largest
``expected tokens(n) − throughput · cost(n)``, and the heads run while the tokens that their candidates lately added to a step,
the cost of their rows subtracted, exceed ``throughput · cost of the heads``. This is Dinkelbach's algorithm for the largest ratio
of two sums, tokens ÷ time: with the best throughput in the rule, the rule gives the best throughput.

Several sequences may share an engine call. Where their rows are packed, the rows of all sequences are one list, sorted by the
probability that their path is right. A step takes its first ones, as many as pay. Where slots are padded, all get one number.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Protocol

from .acceptance_stats import AcceptanceStats
from .adaptive import AdaptiveDrafter
from .draft import Candidates, Draft, Drafter
from .lookup import PromptLookup
from .step_cost import StepCost, Track

if TYPE_CHECKING:
    from ..files.heads import PlattScaling
    from .guide import Guide

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Numbers of rows to choose from where the engine takes any."""

_TOGETHER = (*(size - 1 for size in SIZES), 95, 127, 191, 255)
"""Rows below the roots to choose from where the rows of several sequences are packed."""

_UNTESTED, _MEASURED = 0.5, 2.0
"""Weight of the heads' own probabilities before they were put to the test: without, and with, a measurement of the heads."""

_LEAST_CHANCE = 0.01
_WORTH_IT = 0.02
"""Share of a plain step's tokens that rows must promise to gain where several sequences share it: costs are known that well."""
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
    """A sequence, as far as drafting looks at it. ``deadline``: by the monotonic clock. ``priority``: smaller comes first."""

    drafter: Drafter
    candidates: Candidates | None
    draft: Draft
    """The rows that its newest step verified."""

    deadline: float | None
    priority: int

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

    def __init__(
        self, sizes: tuple[int, ...], num_heads: int, scaling: PlattScaling, *, padded: bool = False, packed: bool = False
    ) -> None:
        """``sizes``: the numbers of rows to choose from, ascending from 1. ``scaling``: of each head.

        ``padded``: all sequences of a step share one number of rows. ``packed``: they share one sum of rows. Otherwise each
        sequence's rows are chosen alone.
        """
        self.clock: Callable[[], float] = time.monotonic
        self._sizes, self._num_heads, self._scaling, self._padded, self._packed = sizes, num_heads, scaling, padded, packed
        # Steps of which the host decides the outcome have other costs: logits leave the engine, heads are a call of their own.
        self._costs: dict[tuple[bool, int], StepCost] = {}
        self.stats = AcceptanceStats(num_heads + 1, weight=_MEASURED if scaling else _UNTESTED)
        self._wait, self._waited = _SOONEST, 0
        self._together: list[Drafting] = []
        self._track = Track()

    def drafter(self, lookup: PromptLookup | None, *, on_host: bool, guide: Guide | None = None) -> AdaptiveDrafter:
        """Make the drafter of a new request."""
        cost = self._cost_of(on_host, max(len(self._together), 1))
        known = cost.to_measure(Track()) is None
        heads = known and self.stats.heads_gain() > self.stats.throughput() * cost.heads
        return AdaptiveDrafter(self._scaling, self._num_heads, lookup, self.stats, heads=heads, guide=guide)

    def choose(self, sequences: Sequence[Drafting]) -> None:
        """Set ``rows`` and ``heads`` of every open drafter for the next step of ``sequences``."""
        if not (self._padded or self._packed):
            for sequence in sequences:
                self._choose_together([sequence])
            return
        if len(sequences) != len(self._together) or any(a is not b for a, b in zip(sequences, self._together, strict=True)):
            self._together, self._track = list(sequences), Track()
        self._choose_together(sequences)

    def learn(self, sequences: Sequence[Drafting], emitted: Sequence[list[int]], seconds: Sequence[float]) -> None:
        """Learn from the chosen step: the tokens that each sequence emitted, and the seconds that its engine call took.

        Seconds of 0 say nothing: a chunk of a prompt was in the same call.
        """
        if self._padded or self._packed:
            self._learn_together(sequences, emitted, max(seconds, default=0.0))
        else:
            for sequence, tokens, taken in zip(sequences, emitted, seconds, strict=True):
                self._learn_together([sequence], [tokens], taken)

    # -- choosing --------------------------------------------------------------------------------------------------

    def _choose_together(self, sequences: Sequence[Drafting]) -> None:
        """Choose for the open drafters of sequences that share an engine call."""
        open_ones = [(s, s.drafter) for s in sequences if isinstance(s.drafter, AdaptiveDrafter)]
        if not open_ones:
            return
        drafters = [drafter for _, drafter in open_ones]
        cost, base = self._cost(sequences), self._fewest(sequences)
        fixed = [s.drafter for s in sequences if not isinstance(s.drafter, AdaptiveDrafter)]
        each = [drafter.stats.throughput() for drafter in drafters]
        throughput = sum(each)
        least = _LEAST_CHANCE if self._padded and len(sequences) > 1 else max(throughput * cost.least_slope, _LEAST_CHANCE)
        if cost.to_measure(self._track_of(drafters)) is not None:
            least = 0.0  # rows that don't pay show what rows cost
        goes_on = False
        for (sequence, drafter), own in zip(open_ones, each, strict=True):
            by_lookup = drafter.rank(sequence.candidates, sequence.remaining - 1, self._sizes[-1] - 1, least)
            if drafter.has_candidates:
                price = throughput if self._packed else own
                gain = _best(drafter.expected, price, cost, base)[1] - _best(by_lookup, price, cost, base)[1]
                for stats in (self.stats, drafter.stats):
                    stats.expect(min(max(gain, 0.0), 1.0))
            goes_on = goes_on or sequence.remaining > 1
        paths, needed = self._in_order(open_ones, cost) if self._packed else ([], 0)
        expected = list(accumulate([chance for chance, _ in paths], initial=0.0)) if self._packed else _sum_of(drafters)
        rows, heads, probing = self._choose(drafters, expected, throughput, cost, base, goes_on=goes_on, alone=not fixed)
        heads = heads or any(drafter.heads for drafter in fixed)
        if self._packed:
            taken = Counter([which for _, which in paths[: max(rows - base, needed)]])
        elif self._padded:
            rows = max([rows, *(drafter.rows for drafter in fixed)])
        for index, drafter in enumerate(drafters):
            drafter.rows = 1 + taken[index] if self._packed else rows
            drafter.heads, drafter.probing = heads, probing

    def _choose(
        self,
        drafters: list[AdaptiveDrafter],
        expected: list[float],
        throughput: float,
        cost: StepCost,
        base: int,
        *,
        goes_on: bool,
        alone: bool,
    ) -> tuple[int, bool, bool]:
        """Return the rows, whether heads run, and whether they run only to see what they would propose.

        ``expected``: tokens by rows beyond ``base``. ``alone``: whether all drafters are open.
        """
        drafted = any(drafter.has_candidates for drafter in drafters)
        track = self._track_of(drafters)
        measured = cost.to_measure(track, base + len(expected) - 1) if drafted else cost.to_measure(track)
        if measured is not None and goes_on and alone:
            rows, heads = measured
            return rows if drafted else base, heads, False
        rows, value = _best(expected, throughput, cost, base)
        if self._packed and len(self._together) > 1 and value < _WORTH_IT * throughput:
            rows = base
        if not goes_on:
            return rows, False, False
        if sum(drafter.stats.heads_gain() for drafter in drafters) > throughput * cost.heads:
            if len(drafters) > 1 and base < rows <= base + len(expected) - 2:
                rows = cost.to_explore(rows, True) or rows
            return rows, True, False
        unknown = len(drafters) > 1 and not all(drafter.was_tried for drafter in drafters)
        probing = self._waited >= (_SOONEST if unknown else self._wait)  # heads may suit the newcomers better than others
        return rows, probing, probing

    def _in_order(
        self, open_ones: Sequence[tuple[Drafting, AdaptiveDrafter]], cost: StepCost
    ) -> tuple[list[tuple[float, int]], int]:
        """List the candidate rows of all sequences as (probability, index of the sequence), in the order to take them.

        First come those that requests need to meet their deadlines, whose number is returned, too: they are taken whether they
        pay or not. All others follow, likeliest first. A sequence's rows keep their order: a child comes behind its parent.
        """
        chances = [[b - a for a, b in pairwise(drafter.expected)] for _, drafter in open_ones]
        needed: list[tuple[float, int]] = []
        late = [index for index, (sequence, _) in enumerate(open_ones) if sequence.deadline is not None]
        for index in sorted(late, key=lambda index: (open_ones[index][0].priority, open_ones[index][0].deadline)):
            sequence, drafter = open_ones[index]
            assert sequence.deadline is not None
            time_left = max(sequence.deadline - self.clock(), cost.plain_seconds)
            missing = sequence.remaining * cost.plain_seconds / time_left - 1 if time_left else 0.0
            count = next((n for n, tokens in enumerate(drafter.expected) if tokens >= missing), len(chances[index]))
            needed += [(chance, index) for chance in chances[index][:count]]
            chances[index] = chances[index][count:]
        others = [(chance, index) for index, own in enumerate(chances) for chance in own]
        return needed + sorted(others, key=lambda each: -each[0]), len(needed)

    # -- learning --------------------------------------------------------------------------------------------------

    def _learn_together(self, sequences: Sequence[Drafting], emitted: Sequence[list[int]], seconds: float) -> None:
        pairs = zip(sequences, emitted, strict=True)
        open_ones = [(s, s.drafter, tokens) for s, tokens in pairs if isinstance(s.drafter, AdaptiveDrafter)]
        if not open_ones:
            return
        cost = self._cost(sequences)
        heads = open_ones[0][1].heads
        # Fewer rows ran than were chosen where there were no candidates for more.
        counts = [sequence.draft.shape.rows for sequence in sequences]
        ran = 1 + sum(count - 1 for count in counts) if self._packed else max(counts)
        rows = next((size for size in cost.sizes if size >= ran), cost.sizes[-1])
        taken = cost.of(rows, heads)
        if seconds > 0:
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
        together = self._padded or (self._packed and len(self._together) > 1)
        return self._track if together else drafters[0].track

    def _fewest(self, sequences: Sequence[Drafting]) -> int:
        """Rows that the next step has whatever is chosen; of a packed step all roots count as one."""
        fixed = [s.drafter.rows for s in sequences if not isinstance(s.drafter, AdaptiveDrafter)]
        return 1 + sum(rows - 1 for rows in fixed) if self._packed else 1

    def _cost(self, sequences: Sequence[Drafting]) -> StepCost:
        return self._cost_of(any(sequence.on_host for sequence in sequences), len(sequences) if self._packed else 1)

    def _cost_of(self, on_host: bool, sequences: int) -> StepCost:
        """Costs of steps with about so many sequences: 1, 2, 3 and 4, 5 to 8 … have theirs together."""
        about = 1 << (sequences - 1).bit_length()
        found = self._costs.get((on_host, about))
        if found is None:
            most = about * (self._sizes[-1] - 1)
            sizes = self._sizes if about == 1 else tuple(1 + more for more in _TOGETHER if more <= most)
            self._costs[on_host, about] = found = StepCost(sizes)
        return found


def _sum_of(drafters: list[AdaptiveDrafter]) -> list[float]:
    """Expected tokens of all sequences by rows below the root of each."""
    if len(drafters) == 1:
        return drafters[0].expected
    longest = max(len(drafter.expected) for drafter in drafters)
    return [sum(drafter.expected[min(rows, len(drafter.expected) - 1)] for drafter in drafters) for rows in range(longest)]


def _best(expected: list[float], throughput: float, cost: StepCost, base: int = 1) -> tuple[int, float]:
    """Return the size with the largest ``expected − throughput · extra cost``, the smallest of equals, and that value.

    ``expected``: tokens by rows beyond ``base``, which the step has in any case.
    """
    best, most, start = base, 0.0, cost.of(base, False)
    last = len(expected) - 1
    for size, taken in zip(cost.sizes, cost.curve, strict=True):
        if size > base:
            value = expected[min(size - base, last)] - throughput * (taken - start)
            if value > most:
                best, most = size, value
    return best, most
