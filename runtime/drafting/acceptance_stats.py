"""Statistics of acceptance: how well each source of candidates is calibrated, and what drafting gains.

A *source* is a head, or lookup. A source's *calibration* is accepted ÷ expected over its recent candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HIGHEST_CALIBRATION = 2.0
"""A source that promises too little is corrected up to this factor."""

_SESSION_MEMORY, _REQUEST_MEMORY = 256.0, 64.0
_HEADS_GAIN = 0.3
"""Assumed tokens that heads add to a step, before they were ever asked."""

_PRIOR_WEIGHT = 2.0


class Ratio:
    """Σ came ÷ Σ expected over about the last ``memory`` observations."""

    __slots__ = ("_came", "_expected", "_keep")

    def __init__(self, memory: float) -> None:
        self._came = self._expected = 0.0
        self._keep = 1 - 1 / memory

    def add(self, came: float, expected: float) -> None:
        """One more observation; those before count for a little less."""
        self._came = self._came * self._keep + came
        self._expected = self._expected * self._keep + expected

    def value(self, prior: float, weight: float) -> float:
        """The ratio, with ``weight`` of expectations before all observations that came true by ``prior``."""
        return (self._came + prior * weight) / (self._expected + weight)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One step of one sequence.

    It emitted ``tokens`` in the time of ``cost`` plain steps. ``tested``: (source, accepted, expected) where candidates were put
    to the test; sources are the heads by number, then lookup.
    """

    tokens: int
    cost: float
    tested: list[tuple[int, float, float]] = field(default_factory=list)


class AcceptanceStats:
    """Statistics of a session, or of a request that starts from those of its session (``prior``)."""

    def __init__(self, sources: int, prior: AcceptanceStats | None = None, weight: float = _PRIOR_WEIGHT) -> None:
        """``sources``: heads and lookup. ``weight``: of the assumption that sources are calibrated, in observations."""
        memory = _SESSION_MEMORY if prior is None else _REQUEST_MEMORY
        self._prior, self._weight = prior, weight
        self._calibration = [Ratio(memory) for _ in range(sources)]
        self._throughput, self._heads_gain = Ratio(memory), Ratio(memory / 4)

    def learn(self, evidence: Evidence) -> None:
        """Add one step."""
        for source, accepted, expected in evidence.tested:
            self._calibration[source].add(accepted, expected)
        self._throughput.add(evidence.tokens, evidence.cost)

    def expect(self, gain: float) -> None:
        """Add one step's expected tokens by the heads' candidates, the cost of their rows subtracted."""
        self._heads_gain.add(gain, 1.0)

    def calibration(self) -> list[float]:
        """Return the factor of each source's probabilities.

        A head that was never put to the test gets the factor of the one before it: it guesses behind that one's guesses.
        """
        values: list[float] = []
        inherited = None if self._prior is None else self._prior.calibration()
        for source, ratio in enumerate(self._calibration):
            of_its_own = source in (0, len(self._calibration) - 1)
            start = inherited[source] if inherited else 1.0 if of_its_own else min(values[-1], 1.0)
            values.append(min(ratio.value(start, self._weight), HIGHEST_CALIBRATION))
        return values

    def throughput(self) -> float:
        """Return the tokens emitted in the time of a plain step; at least the one that plain decoding emits."""
        return max(1.0, self._throughput.value(1.0 if self._prior is None else self._prior.throughput(), 16))

    def heads_gain(self) -> float:
        """Return the tokens that heads' candidates lately promised to add to a step, the cost of their rows subtracted."""
        return self._heads_gain.value(_HEADS_GAIN if self._prior is None else self._prior.heads_gain(), 4)
