"""Finds the best tree of every size by the heads' hits, and the size that pays most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...runtime.errors import UsageError
from ...runtime.tree import RankPath, Tree, tree_of_paths
from .hit_table import HitTable

MOST_ROWS = 64
_Grown = tuple[float, tuple[RankPath, ...]]


def best_trees(rates: np.ndarray, most_rows: int) -> list[tuple[Tree, float]]:
    """Find, for 1 … ``most_rows`` rows, the tree with the most expected tokens a step. Returns it with that number.

    Heads count as right independently of each other: a path counts with the product of its ranks' rates. The construction is
    dynamic programming as in Sequoia (arXiv 2402.12374, section 3), with a table for each head instead of one for all depths.

    ``rates`` float64 [K, k] say how often rank r of head h is right; they may be in any order. A tree has fewer rows where the
    heads have no more paths.
    """
    heads, ranks = rates.shape
    # below[n]: (value, paths) of the best n rows, root included; that root is one depth below this head.
    below: list[_Grown] = [(0.0, ()), *((1.0, ()) for _ in range(most_rows))]
    for head in reversed(range(heads)):
        # forest[m]: the best m rows or fewer; their topmost are this head's candidates of the ranks seen so far.
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


def search(table: HitTable, times: Mapping[int, float], rows: int | None = None) -> dict[str, Any]:
    """Find the best tree of every size, and the size with the largest expected speed-up over one row; ``rows`` forces it.

    ``times`` are ms a step by rows, 1 among them. Trees are of the counted paths. ``independent`` is what dynamic programming
    over the rates by head and rank expects of its own tree, as if heads were right independently of each other. ``expected_by``
    is ``replay`` where expected lengths come from decoding what was counted, and ``rates`` where they are averages over all
    positions.

    Raises:
        UsageError: no size to choose by, or more rows than there are paths for.
    """
    independent = best_trees(table.rates, MOST_ROWS)
    sizes = []
    for size in range(1, MOST_ROWS + 1):
        tree = tree_of_paths(table.paths, size)
        if tree.rows < size:
            break
        promising, value = independent[size - 1]
        entry: dict[str, Any] = {
            "rows": size,
            "expected_acceptance_length": table.acceptance_length(tree),
            "independent": value,
            "independent_counted": table.acceptance_length(promising),
            "choices": tree.choices(),
        }
        if size in times and 1 in times:
            entry["ms_per_step"] = times[size]
            entry["speedup"] = entry["expected_acceptance_length"] * times[1] / times[size]
        sizes.append(entry)
    timed = [entry for entry in sizes if "speedup" in entry]
    if rows is not None and rows > len(sizes):
        raise UsageError(f"{rows} rows, and trees go to {len(sizes)}", hint=f"give --rows {len(sizes)} or less, or more prompts")
    if rows is None and not timed:
        raise UsageError("there are no step times to choose a size by", hint="give BUNDLE as well, or --rows N")
    best = sizes[rows - 1] if rows is not None else max(timed, key=lambda entry: float(entry["speedup"]))
    return {
        "rows": best["rows"],
        "expected_acceptance_length": best["expected_acceptance_length"],
        "expected_by": "rates" if table.ranks is None else "replay",
        "choices": best["choices"],
        "sizes": [{key: value for key, value in entry.items() if key != "choices"} for entry in sizes],
        "table": table.to_json(),
        "ms_by_rows": dict(times),
    }
