"""What a session and each of its requests hold true of drafts: how far promises were kept, and what drafting is worth."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_TRUST = 2.0
"""A source that promises too little is believed up to this much more."""

_SESSION_MEMORY, _REQUEST_MEMORY = 256.0, 64.0
_WORTH = 0.3
"""What heads are taken to add to a step, in tokens, before they were ever asked."""

_TESTED = 2.0


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
    """What one step of one sequence showed.

    ``trust``: (source, came, expected) where a promise was put to the test; sources are the heads by number, then lookup.
    ``tokens`` were emitted in the time of ``cost`` plain steps.
    """

    tokens: int
    cost: float
    trust: list[tuple[int, float, float]] = field(default_factory=list)


class Beliefs:
    """Of a session, or of a request that starts from what its session holds true (``prior``)."""

    def __init__(self, sources: int, prior: Beliefs | None = None, weight: float = _TESTED) -> None:
        """``sources``: heads and lookup. ``weight``: of the belief that promises are kept, before they were put to the test."""
        memory = _SESSION_MEMORY if prior is None else _REQUEST_MEMORY
        self._prior, self._weight = prior, weight
        self._trust = [Ratio(memory) for _ in range(sources)]
        self._pace, self._worth = Ratio(memory), Ratio(memory / 4)

    def learn(self, evidence: Evidence) -> None:
        """Take in what a step showed."""
        for source, came, expected in evidence.trust:
            self._trust[source].add(came, expected)
        self._pace.add(evidence.tokens, evidence.cost)

    def expect(self, worth: float) -> None:
        """Heads' candidates promise to add so many tokens to a step, beyond the cost of their rows."""
        self._worth.add(worth, 1.0)

    def trust(self) -> list[float]:
        """What each source's chances are to be multiplied by.

        A head that was never put to the test is believed as much as the one before it: it guesses behind that one's guesses.
        """
        values: list[float] = []
        inherited = None if self._prior is None else self._prior.trust()
        for source, ratio in enumerate(self._trust):
            of_its_own = source in (0, len(self._trust) - 1)
            start = inherited[source] if inherited else 1.0 if of_its_own else min(values[-1], 1.0)
            values.append(min(ratio.value(start, self._weight), MOST_TRUST))
        return values

    def pace(self) -> float:
        """Tokens in the time of a plain step; at least the one that plain decoding emits."""
        return max(1.0, self._pace.value(1.0 if self._prior is None else self._prior.pace(), 16))

    def worth(self) -> float:
        """Tokens that heads' candidates lately promised to add to a step, beyond the cost of their rows."""
        return self._worth.value(_WORTH if self._prior is None else self._prior.worth(), 4)
