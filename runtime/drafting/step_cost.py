"""What steps of different sizes cost on the engine at hand, learnt from the steps themselves."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

PLAIN = (1, False)
"""One row without heads: its cost is the unit."""

_SLOPE, _HEADS = 0.05, 0.05
"""What a row and the heads are taken to cost before any step has been seen."""

_LEAST = 0.01
_STEADY = 0.05
"""Uncertainty of a cost that was seen often, as a share of that of one observation: costs drift."""

_ALONE, _LONGEST = 3, 32
"""Steps of one size in a row after which it is compared: at first, and when it was compared often."""

StepKind = tuple[int, bool]
"""Rows of a step, and whether the heads ran in it."""


class StepCost:
    """Costs of steps in plain steps. A step of n rows costs ``of(n, heads)`` times what a plain one does.

    Times are only compared between two steps that followed each other: they ran under the same load and behind the same context,
    so the ratio of their times is that of their costs, however busy the machine is. Each observation moves the two costs by as
    much as they are uncertain; a surprise is cut off, so that an interrupted step can't move them far. Nothing is assumed about
    the curve's form: kernels work in tiles, and a size may well cost less than a smaller one.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        """``sizes``: the numbers of rows that a step may have, ascending from 1."""
        assert sizes[0] == 1 and all(a < b for a, b in pairwise(sizes))
        self.sizes = sizes
        self.heads = _HEADS
        self._known = {1: 1.0}
        self._seen: Counter[StepKind] = Counter()
        self._compared: Counter[StepKind] = Counter()
        self._newest: tuple[StepKind, float] | None = None
        self._in_a_row = 0
        small, large = (next((size for size in sizes if size >= wish), sizes[-1]) for wish in (4, 8))
        self._first = {PLAIN: 4, (1, True): 4, **{(size, True): 2 for size in (small, large)}}
        self._draw()

    def _draw(self) -> None:
        self.curve = tuple(self._between(size) for size in self.sizes)
        slopes = [(self.curve[i + 1] - self.curve[i]) / (b - a) for i, (a, b) in enumerate(pairwise(self.sizes))]
        self.least_slope = max(min(slopes, default=0.0), 0.0)
        """What one more row costs where it costs least."""

    def of(self, rows: int, heads: bool) -> float:
        """The cost of one step, in plain steps."""
        return self._between(rows) + heads * self.heads

    def to_measure(self) -> StepKind | None:
        """What the next step should be to learn costs that are guesses yet; None when enough is known to choose.

        A size that is taken again and again is compared with one row now and then: alone, it would never be found out.
        """
        if self._newest is not None:
            (rows, heads), _ = self._newest
            if rows > 1 and self._in_a_row >= min(_ALONE + 2 * self._compared[rows, heads], _LONGEST):
                return 1, heads
        wanting = [kind for kind, times in self._first.items() if self._seen[kind] < times]
        return min(wanting, key=lambda kind: self._seen[kind], default=None)

    def observe(self, rows: int, heads: bool, seconds: float) -> None:
        """A step took so long. The first one of a kind isn't counted: engines allocate what it needs."""
        kind, previous = (rows, heads), self._newest
        self._seen[kind] += 1
        self._in_a_row = self._in_a_row + 1 if previous is not None and previous[0] == kind else 1
        self._newest = (kind, seconds) if seconds > 0 and self._seen[kind] > 1 else None
        if self._newest is None or previous is None or previous[0] == kind:
            return
        surprise = math.log(seconds / previous[1]) - math.log(self.of(*kind) / self.of(*previous[0]))
        new, old = self._uncertainty(kind), self._uncertainty(previous[0])
        surprise = max(-0.2 - 0.3 * (new + old), min(surprise, 0.2 + 0.3 * (new + old)))
        self._move(kind, surprise * new / (1 + new + old))
        self._move(previous[0], -surprise * old / (1 + new + old))
        self._compared.update((kind, previous[0]))
        self._draw()

    def pause(self) -> None:
        """Something else comes between the newest step and the next: they aren't comparable."""
        self._newest = None

    def shown(self) -> dict[str, float]:
        """The curve for people: cost by number of rows, and of the heads."""
        costs = {str(size): round(cost, 3) for size, cost in zip(self.sizes, self.curve, strict=True)}
        return {**costs, "heads": round(self.heads, 3)}

    def _between(self, rows: int) -> float:
        """The cost of the rows: as observed, or on a line between, or beyond, sizes that were."""
        if rows in self._known:
            return self._known[rows]
        below = max(size for size in self._known if size < rows)
        above = min((size for size in self._known if size > rows), default=0)
        start = self._known[below]
        if above:
            return start + (self._known[above] - start) * (rows - below) / (above - below)
        return start + max((start - 1) / (below - 1) if below > 1 else _SLOPE, 0.0) * (rows - below)

    def _uncertainty(self, kind: StepKind) -> float:
        """Variance of the logarithm of a cost, in those of one observation."""
        return 0.0 if kind == PLAIN else max(1 / (self._compared[kind] + 0.5), _STEADY)

    def _move(self, kind: StepKind, change: float) -> None:
        if kind == PLAIN:
            return
        rows, heads = kind
        cost = self.of(rows, heads) * math.exp(change)
        if rows == 1:
            self.heads = max(cost - 1, _LEAST)
        else:
            self._known[rows] = max(cost - heads * self.heads, _LEAST)
