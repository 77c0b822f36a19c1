"""Candidate trees: random ones, and a wide one."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from medusa_deploy.runtime.tree import RankPath, Tree

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])


def grow(seeds: list[tuple[int, int]], *, depth: int, top_k: int) -> list[RankPath]:
    """A prefix-closed set: each pair (parent, rank) hangs one path below an earlier one, where that is allowed and new."""
    paths: list[RankPath] = [()]
    for parent, rank in seeds:
        path = (*paths[parent % len(paths)], rank % top_k)
        if len(path) <= depth and path not in paths:
            paths.append(path)
    return paths[1:]


def prefix_closed(*, depth: int = 4, top_k: int = 4, max_rows: int = 16) -> st.SearchStrategy[list[RankPath]]:
    """Choices in an order of no meaning."""
    pairs = st.tuples(st.integers(0, max_rows), st.integers(0, top_k - 1))
    grown = st.lists(pairs, max_size=max_rows - 1).map(lambda seeds: grow(seeds, depth=depth, top_k=top_k))
    return grown.flatmap(st.permutations)


def random_tree(rng: np.random.Generator, *, depth: int = 3, top_k: int = 4, max_rows: int = 16) -> Tree:
    """A tree of at most ``max_rows`` rows."""
    count = int(rng.integers(0, max_rows))
    seeds = [(int(parent), int(rank)) for parent, rank in rng.integers(0, 1 << 16, (count, 2))]
    return Tree.from_choices(grow(seeds, depth=depth, top_k=top_k))
