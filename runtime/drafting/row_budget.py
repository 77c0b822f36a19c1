"""How many rows a step gets, and whether the heads run in it: what they promise against what they cost.

The rule. Let a plain step take one unit of time and emit one token. A session that emits ``pace`` tokens in a unit loses that
many for every unit that a step takes longer. So a step takes the size with the most ``promised tokens - pace · cost``, and heads
run as long as what their candidates lately added to a step, beyond the cost of its rows, exceeds ``pace · cost of the heads``.
This is Dinkelbach's way to the largest ratio of two sums: where ``pace`` is the best there is, so is the rule.
"""

from __future__ import annotations

from ..files.heads import PlattScaling
from ..loop.acceptance import Acceptance
from ..loop.sequence import Sequence
from .acceptance_stats import Beliefs
from .adaptive import AutoRows
from .lookup import PromptLookup
from .step_cost import StepCost

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Numbers of rows that are chosen from where the engine takes any."""

_UNTESTED, _MEASURED = 0.5, 2.0
"""How much the heads' own probabilities count before they were put to the test: nobody, or somebody, measured the heads."""

_LEAST_CHANCE = 0.01
_SHOWN = 16
_SOONEST, _LATEST = 4, 64
"""Plain steps between two looks at what the heads would say."""


class RightSize:
    """Chooses for all sequences of a step that leave their rows open; owned by a session, one step at a time."""

    def __init__(self, sizes: tuple[int, ...], num_heads: int, scaling: PlattScaling) -> None:
        """``sizes``: the numbers of rows to choose from, ascending from 1. ``scaling``: of each head."""
        self._num_heads, self._scaling = num_heads, scaling
        # Steps of which the host decides the outcome have other costs: logits leave the engine, heads are a call of their own.
        self._costs = {on_host: StepCost(sizes) for on_host in (False, True)}
        self.beliefs = Beliefs(num_heads + 1, weight=_MEASURED if scaling else _UNTESTED)
        self._wait, self._waited = _SOONEST, 0

    def drafter(self, lookup: PromptLookup | None, *, on_host: bool) -> AutoRows:
        """Of a new request."""
        cost = self._costs[on_host]
        heads = cost.to_measure() is None and self.beliefs.worth() > self.beliefs.pace() * cost.heads
        return AutoRows(self._scaling, self._num_heads, lookup, self.beliefs, heads=heads)

    def plan(self, sequences: list[Sequence]) -> None:
        """Set ``rows`` and ``heads`` of every open sequence's drafter for the step that is next."""
        open_ones = [(s, s.drafter) for s in sequences if isinstance(s.drafter, AutoRows)]
        if not open_ones:
            return
        drafters = [drafter for _, drafter in open_ones]
        cost = self._cost(sequences)
        fixed = [s.drafter for s in sequences if not isinstance(s.drafter, AutoRows)]
        paces = [drafter.beliefs.pace() for drafter in drafters]
        pace = sum(paces)
        least = _LEAST_CHANCE if len(sequences) > 1 else max(pace * cost.least_slope, _LEAST_CHANCE)
        goes_on = False
        for (sequence, drafter), own in zip(open_ones, paces, strict=True):
            by_lookup = drafter.rank(sequence.candidates, sequence.remaining - 1, cost.sizes[-1] - 1, least)
            if drafter.has_candidates:
                worth = _best(drafter.gains, own, cost)[1] - _best(by_lookup, own, cost)[1]
                for beliefs in (self.beliefs, drafter.beliefs):
                    beliefs.expect(min(max(worth, 0.0), 1.0))
            goes_on = goes_on or sequence.remaining > 1
        rows, heads, probing = self._choose(drafters, pace, cost, goes_on=goes_on, alone=not fixed)
        rows = max([rows, *(drafter.rows for drafter in fixed)])
        heads = heads or any(drafter.heads for drafter in fixed)
        for drafter in drafters:
            drafter.rows, drafter.heads, drafter.probing = rows, heads, probing

    def _choose(
        self, drafters: list[AutoRows], pace: float, cost: StepCost, *, goes_on: bool, alone: bool
    ) -> tuple[int, bool, bool]:
        """Rows, whether heads run, and whether only to see what they would say."""
        measured = cost.to_measure()
        if measured is not None and goes_on and alone:
            rows, heads = measured
            if rows > 1 and not any(drafter.has_candidates for drafter in drafters):
                rows = 1
            return rows, heads, False
        longest = max(len(drafter.gains) for drafter in drafters)
        gains = drafters[0].gains if len(drafters) == 1 else [
            sum(drafter.gains[min(rows, len(drafter.gains) - 1)] for drafter in drafters) for rows in range(longest)
        ]
        rows, _ = _best(gains, pace, cost)
        if not goes_on:
            return rows, False, False
        if sum(drafter.beliefs.worth() for drafter in drafters) > pace * cost.heads:
            return rows, True, False
        probing = self._waited >= self._wait
        return rows, probing, probing

    def learn(self, sequences: list[Sequence], outcomes: list[Acceptance], seconds: float) -> None:
        """Take in what the planned step emitted, and how long it took."""
        pairs = zip(sequences, outcomes, strict=True)
        open_ones = [(s, s.drafter, o.tokens) for s, o in pairs if isinstance(s.drafter, AutoRows)]
        if not open_ones:
            return
        cost = self._cost(sequences)
        rows, heads = open_ones[0][1].rows, open_ones[0][1].heads
        taken = cost.of(rows, heads)
        cost.observe(rows, heads, seconds)
        for sequence, drafter, tokens in open_ones:
            evidence = drafter.tested(tokens, taken)
            self.beliefs.learn(evidence)
            drafter.beliefs.learn(evidence)
            sequence.stats.probes += drafter.probing
            if sequence.finish_reason is not None or sequence.stats.steps % _SHOWN == 1:
                sequence.stats.trust = [round(trust, 3) for trust in drafter.beliefs.trust()]
                sequence.stats.costs = cost.shown()
        self._waited = 0 if heads else self._waited + 1
        guesses = [drafter.guessed(tokens[0]) for _, drafter, tokens in open_ones if drafter.has_candidates]
        if guesses and not heads:  # this step could see what a probe brought
            self._wait = max(self._wait // 2, _SOONEST) if any(guesses) else min(self._wait * 2, _LATEST)

    def pause(self) -> None:
        """A prefill comes between two steps."""
        for cost in self._costs.values():
            cost.pause()

    def _cost(self, sequences: list[Sequence]) -> StepCost:
        return self._costs[any(not sequence.params.plain_argmax for sequence in sequences)]


def _best(gains: list[float], pace: float, cost: StepCost) -> tuple[int, float]:
    """The size with the most promised tokens beyond the cost, the smallest of equals, and what it has beyond a plain step."""
    best, most = 1, 0.0
    last = len(gains) - 1
    for size, taken in zip(cost.sizes, cost.curve, strict=True):
        value = gains[min(size - 1, last)] - pace * (taken - 1)
        if value > most:
            best, most = size, value
    return best, most
