"""Learns the cost of a step by its number of rows, on the engine at hand, from the steps themselves."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

PLAIN = (1, False)
"""Roots alone, without heads: its cost is the unit."""

_SLOPE, _HEADS = 0.05, 0.05
"""Assumed costs of a row and of the heads before any step has been seen."""

_LEAST = 0.01
_STEADY = 0.05
"""Least uncertainty of a cost, as a share of the uncertainty of one observation: costs drift."""

_ALONE, _LONGEST = 3, 32
"""Steps of one size in a row after which it is compared with a plain step: at first, and when it was compared often."""

_SELDOM, _KNOWN = 4, 8
"""A size beside the best one is tried in place of every so manyth step, until so many steps of it were compared."""

StepKind = tuple[int, bool]
"""Rows of a step, and whether the heads ran in it."""


@dataclass(slots=True)
class Track:
    """The newest steps of the same sequences: ``newest`` with its seconds, and how many of its kind there were in a row."""

    newest: tuple[StepKind, float] | None = None
    in_a_row: int = 0


class StepCost:
    """Costs of steps, in plain steps: ``of(n, heads)`` = time of a step of n rows ÷ time of a plain one.

    A plain step has no heads and no rows but the roots. n counts the rows of all sequences, and their roots as one.

    Only two steps of the same sequences that followed each other are compared. They ran under the same load and behind the same
    context, so the ratio of their times is the ratio of their costs, however busy the machine is. Prefill chunks in between don't
    count in these times. Each observation moves both costs by as much as they are uncertain. A surprise is cut off, so that an
    interrupted step can't move them far. The curve may have any form: kernels work in tiles, and a size may cost less than a
    smaller one.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        """``sizes``: the numbers of rows that a step may have, ascending from 1."""
        assert sizes[0] == 1 and all(a < b for a, b in pairwise(sizes))
        self.sizes = sizes
        self.heads = _HEADS
        self.plain_seconds = 0.0
        """Time of a plain step lately; 0 before one was seen."""
        self._known = {1: 1.0}
        self._seen: Counter[StepKind] = Counter()
        self._compared: Counter[StepKind] = Counter()
        small, large = (next((size for size in sizes if size >= wish), sizes[-1]) for wish in (4, 8))
        self._first = {PLAIN: 4, (1, True): 4, **{(size, True): 2 for size in (small, large)}}
        self._draw()

    def _draw(self) -> None:
        self.curve = tuple(self._between(size) for size in self.sizes)
        slopes = [(self.curve[i + 1] - self.curve[i]) / (b - a) for i, (a, b) in enumerate(pairwise(self.sizes))]
        self.least_slope = max(min(slopes, default=0.0), 0.0)
        """Smallest cost of one more row."""

    def of(self, rows: int, heads: bool) -> float:
        """The cost of one step, in plain steps."""
        return self._between(rows) + heads * self.heads

    def to_measure(self, track: Track, most: int = sys.maxsize) -> StepKind | None:
        """The kind of step of at most ``most`` rows that teaches most where costs are guesses yet.

        None when enough is known to choose. A size that is taken again and again is compared with a plain one now and then:
        alone, it would never be found out.
        """
        if track.newest is not None:
            (rows, heads), _ = track.newest
            if rows > 1 and track.in_a_row >= min(_ALONE + 2 * self._compared[rows, heads], _LONGEST):
                return 1, heads
        wanting = [kind for kind, times in self._first.items() if kind[0] <= most and self._seen[kind] < times]
        return min(wanting, key=lambda kind: self._seen[kind], default=None)

    def to_explore(self, rows: int, heads: bool) -> int | None:
        """A size beside ``rows``, the best one known, to take in its place once: few steps of it were compared yet.

        Costs rise in stairs, so the next size may cost nothing more. None for three of four steps, and when both sides are known.
        """
        if rows not in self.sizes or self._seen[rows, heads] % _SELDOM:
            return None
        at = self.sizes.index(rows)
        beside = [size for size in self.sizes[max(at - 1, 1) : at + 2] if self._compared[size, heads] < _KNOWN]
        return min((size for size in beside if size != rows), key=lambda size: self._compared[size, heads], default=None)

    def observe(self, rows: int, heads: bool, seconds: float, track: Track) -> None:
        """Learn from a step and the one before it in ``track``. The first one of a kind only warms up: engines allocate then."""
        kind, previous = (rows, heads), track.newest
        self._seen[kind] += 1
        if self._seen[kind] > 1:
            plain = seconds / self.of(rows, heads)
            self.plain_seconds += (plain - self.plain_seconds) * (0.1 if self.plain_seconds else 1.0)
        track.in_a_row = track.in_a_row + 1 if previous is not None and previous[0] == kind else 1
        track.newest = (kind, seconds) if seconds > 0 and self._seen[kind] > 1 else None
        if track.newest is None or previous is None or previous[0] == kind:
            return
        surprise = math.log(seconds / previous[1]) - math.log(self.of(*kind) / self.of(*previous[0]))
        new, old = self._uncertainty(kind), self._uncertainty(previous[0])
        surprise = max(-0.2 - 0.3 * (new + old), min(surprise, 0.2 + 0.3 * (new + old)))
        self._move(kind, surprise * new / (1 + new + old))
        self._move(previous[0], -surprise * old / (1 + new + old))
        self._compared.update((kind, previous[0]))
        self._draw()

    def shown(self) -> dict[str, float]:
        """Return the curve for people: costs by number of rows, and of the heads."""
        costs = {str(size): round(cost, 3) for size, cost in zip(self.sizes, self.curve, strict=True)}
        return {**costs, "heads": round(self.heads, 3)}

    def _between(self, rows: int) -> float:
        """Return the cost of the rows: as observed, or on a line between or beyond the observed sizes."""
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
