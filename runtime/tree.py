"""Compiles candidate trees: from the choices that a user writes to the rows, depths and ancestors that a step needs.

A tree is a set of *paths of ranks*, the root excluded: ``(0, 2)`` takes the best candidate of head 0, then the candidate of
rank 2 of head 1. The set is prefix-closed. Rows are the paths sorted by (length, path); row 0 is the root. The format is
Medusa's ``medusa_choices`` (arXiv 2401.10774, section 2.1.2 and its appendix on sparse trees).

Worked example, ``Tree.from_choices([(0,), (1,), (0, 0)])``::

    root ─┬─ (0,) ── (0, 0)        row      0     1     2     3
          └─ (1,)                  path     ()   (0,)  (1,) (0, 0)
                                   parent   -1    0     0     1
    ancestors                      depth     0    1     1     2
      T F F F
      T T F F
      T F T F
      T T F T
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from .arguments import shown
from .errors import TreeError

RankPath = tuple[int, ...]
MAX_ROWS = 512
_HIGHEST_RANK = 2**31 - 1
_KEPT_ROWS = 64
"""Shapes of more rows are made anew each time: a thousand of the largest would take gigabytes."""


@dataclass(frozen=True, eq=False)
class Shape:
    """The relations of the N rows of a step. Rows are in breadth order: row 0 is the root, a parent stands before its children.

    A shape equals itself alone; a tree equals those of the same paths.

    ``parents`` int64 [N]: row to parent row, -1 for the root. ``depths`` int64 [N]: 0 for the root.
    ``ancestors`` bool [N, N]: ``[i, j]`` is true if row j is row i or an ancestor of it.
    """

    parents: np.ndarray = field(repr=False, compare=False)
    depths: np.ndarray = field(repr=False, compare=False)
    ancestors: np.ndarray = field(repr=False, compare=False)

    @staticmethod
    @lru_cache(maxsize=32)
    def chain(rows: int) -> Shape:
        """``rows`` rows below each other, as in a prefill; the same object for equal numbers."""
        order = np.arange(rows)
        return Shape(order - 1, order, np.tri(rows, dtype=bool))

    @staticmethod
    def of(parents: tuple[int, ...]) -> Shape:
        """Makes the shape in which row i hangs below ``parents[i]``. Those of few rows are kept, the most recent ones."""
        return _kept(parents) if len(parents) <= _KEPT_ROWS else _made(parents)

    @property
    def rows(self) -> int:
        """N, the root included."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """The largest number of drafted tokens that one step can accept."""
        return int(self.depths[-1])

    @cached_property
    def unrelated(self) -> np.ndarray:
        """float32 [N, N]: 1 where row j is neither row i nor an ancestor of it."""
        return (~self.ancestors).astype(np.float32)

    @cached_property
    def on_path(self) -> np.ndarray:
        """float32 [N, N]: 1 where row i, the root excepted, is on the path to row j."""
        found = self.ancestors.T.astype(np.float32)
        found[0] = 0
        return found

    @cached_property
    def row_paths(self) -> tuple[tuple[int, ...], ...]:
        """The path of each row: the rows from below the root down to it."""
        paths: list[tuple[int, ...]] = [()]
        for row, parent in enumerate(self.parents[1:].tolist(), start=1):
            paths.append((*paths[parent], row))
        return tuple(paths)


def _made(parents: tuple[int, ...]) -> Shape:
    depths = np.zeros(len(parents), np.int64)
    ancestors = np.eye(len(parents), dtype=bool)
    for row, parent in enumerate(parents[1:], start=1):
        depths[row] = depths[parent] + 1
        ancestors[row] |= ancestors[parent]
    return Shape(np.array(parents, np.int64), depths, ancestors)


_kept = lru_cache(maxsize=1024)(_made)


@dataclass(frozen=True)
class Tree(Shape):
    """A compiled tree: a shape whose rows are candidates of the heads.

    ``paths``: row to path of ranks. ``ranks`` int64 [N]: rank of a row's token among its head's candidates. The root's 0 has no
    meaning.
    """

    paths: tuple[RankPath, ...]
    ranks: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]]) -> Tree:
        """Compiles choices. Their order doesn't matter.

        Raises:
            TreeError: the paths aren't prefix-closed; a path is duplicated, empty or negative; or the tree is over ``MAX_ROWS``.
        """
        paths: list[RankPath] = [()]
        seen: set[RankPath] = {()}
        for choice in choices:
            path = _checked_path(choice)
            if path in seen:
                raise TreeError(f"path {list(path)} occurs twice", hint="list every path once")
            seen.add(path)
            paths.append(path)
        if len(paths) > MAX_ROWS:
            raise TreeError(f"a tree of {len(paths)} rows is over the limit of {MAX_ROWS}", hint="prune the tree")
        paths.sort(key=lambda path: (len(path), path))
        row_of = {path: row for row, path in enumerate(paths)}
        for path in paths[1:]:
            if path[:-1] not in row_of:
                raise TreeError(
                    f"path {list(path)} has no parent {list(path[:-1])}",
                    hint="a tree is prefix-closed: add every prefix of every path",
                )
        shape = Shape.of((-1, *(row_of[path[:-1]] for path in paths[1:])))
        ranks = np.array([path[-1] if path else 0 for path in paths], np.int64)
        return cls(shape.parents, shape.depths, shape.ancestors, tuple(paths), ranks)

    @cached_property
    def slots(self) -> np.ndarray:
        """Indices of the drafted rows' tokens in the candidates [K, k]: int64 [2, N-1], heads (depth - 1) above ranks."""
        return np.stack([self.depths[1:] - 1, self.ranks[1:]])

    def choices(self) -> list[list[int]]:
        """Returns the tree in Medusa's format: all paths but the root, in row order."""
        return [list(path) for path in self.paths[1:]]

    def check_fits(self, heads: int, top_k: int) -> None:
        """Refuses a tree that needs more than the heads return.

        Raises:
            TreeError: the tree is deeper than the number of heads, or has a rank ≥ the number of candidates of a head.
        """
        if self.depth > heads:
            raise TreeError(
                f"the tree is {self.depth} deep, and there are {heads} heads",
                hint=f"drop paths longer than {heads}: a row at depth d needs the candidates of head d",
            )
        highest = int(self.ranks.max())
        if highest >= top_k:
            raise TreeError(
                f"the tree uses rank {highest}, and a head returns {top_k} candidates (ranks 0 to {top_k - 1})",
                hint=f"export with --top-k {highest + 1} or more, or drop those paths",
            )


def _checked_path(choice: Sequence[int]) -> RankPath:
    if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence) or not choice:
        raise TreeError(f"{choice!r} is not a path", hint="a path is a non-empty list of ranks such as [0, 2]")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in choice):
        raise TreeError(f"path {list(choice)} holds something other than ranks (0, 1, 2 …)", hint="ranks are integers from 0")
    if max(choice) > _HIGHEST_RANK:
        raise TreeError(f"path {shown(list(choice))} holds a rank over {_HIGHEST_RANK}", hint="no vocabulary is that large")
    return tuple(choice)


ROOT_ONLY = Tree.from_choices([])


def chain(depth: int) -> Tree:
    """Makes a chain of ``depth`` + 1 rows: the best candidate of each head, one after another."""
    return Tree.from_choices([(0,) * length for length in range(1, depth + 1)])


def expected_acceptance_length(tree: Tree, path_rates: Mapping[RankPath, float]) -> float:
    """Returns 1 + Σ rate of a path: the mean tokens of a step of ``tree`` over all positions that ``path_rates`` were counted at.

    A path that isn't in ``path_rates`` was never right. Decoding skips most positions that were easy to guess, so it emits a few
    percent fewer: :func:`.hits.replayed_acceptance_length` counts them from the ranks at each position.
    """
    return 1 + sum(path_rates.get(path, 0.0) for path in tree.paths[1:])


def tree_of_paths(path_rates: Mapping[RankPath, float], rows: int) -> Tree:
    """Finds the tree of at most ``rows`` rows with the largest expected number of accepted tokens.

    ``path_rates``: path of ranks to the rate at which the backbone emits it. A path is right at most as often as its prefixes. So
    the most frequent paths, shorter ones first, are prefix-closed, and no other choice has a larger sum.
    """
    order = sorted(path_rates, key=lambda path: (-path_rates[path], len(path), path))
    return Tree.from_choices(order[: rows - 1])
