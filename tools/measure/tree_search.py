"""The best tree of every size for heads that are right independently of each other, by dynamic programming.

The construction is Sequoia's (arXiv 2402.12374, section 3), with a table for each head instead of one for all depths.
"""

from __future__ import annotations

import numpy as np

from ...runtime.tree import RankPath, Tree

_Grown = tuple[float, tuple[RankPath, ...]]


def best_trees(rates: np.ndarray, most_rows: int) -> list[tuple[Tree, float]]:
    """For 1 … ``most_rows`` rows: the tree with the most expected tokens a step, and that number.

    ``rates`` float64 [K, k]: how often rank r of head h is right. A path counts with the product of its ranks'
    rates, which may be in any order. A tree has fewer rows where the heads have no more paths.
    """
    heads, ranks = rates.shape
    # below[n]: (value, paths) of the best n rows, their own root included, whose root is at the depth after this one.
    below: list[_Grown] = [(0.0, ()), *((1.0, ()) for _ in range(most_rows))]
    for head in reversed(range(heads)):
        # forest[m]: the best at most m rows whose topmost are this head's candidates of the ranks looked at so far.
        forest: list[_Grown] = [(0.0, ())] * most_rows
        for rank in reversed(range(ranks)):
            rate = float(rates[head, rank])
            grown: list[_Grown] = []
            for rows in range(most_rows):
                split = max(range(rows + 1), key=lambda own: forest[rows - own][0] + rate * below[own][0])
                value, paths = forest[rows - split]
                if split:
                    paths = ((rank,), *((rank, *path) for path in below[split][1]), *paths)
                grown.append((value + rate * below[split][0], paths))
            forest = grown
        below = [(0.0, ()), *((1.0 + value, paths) for value, paths in forest)]
    return [(Tree.from_choices(paths), value) for value, paths in below[1:]]
