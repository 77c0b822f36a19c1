"""How often heads are right, counted: by rank, and by path of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .tree import RankPath

MISS = -1
NO_LABEL = -2


def ranks_of(candidates: np.ndarray, labels: Sequence[int]) -> list[int]:
    """For each head, the rank of what came among its candidates int64 [K, k]; ``MISS``, or ``NO_LABEL`` past the end."""
    ranks = []
    for head, tokens in enumerate(candidates.tolist()):
        if head >= len(labels):
            ranks.append(NO_LABEL)
        else:
            ranks.append(tokens.index(labels[head]) if labels[head] in tokens else MISS)
    return ranks


def rank_rates(ranks: np.ndarray, top_k: int) -> np.ndarray:
    """Share of positions whose label is the candidate of rank r of head h, float64 [K, top_k].

    ``ranks`` int64 [n, K]: of each position's labels. Each head is counted over all positions that have a label.
    """
    hits = np.stack([(ranks == rank).sum(0) for rank in range(top_k)], 1)
    return np.asarray(hits / np.maximum((ranks != NO_LABEL).sum(0), 1)[:, None])


def path_rates(ranks: np.ndarray) -> dict[RankPath, float]:
    """Share of positions whose next labels are the candidates on a path of ranks; ``ranks`` int64 [n, K].

    Heads hit together: where the first guess is right the second is right more often than on average, so the product of their
    rates underrates deep paths. Every path that was right at least once is here. Positions without a label for the first head
    are left out.
    """
    positions = ranks[ranks[:, 0] != NO_LABEL]
    counts: Counter[RankPath] = Counter()
    for row in positions.tolist():
        path: RankPath = ()
        for rank in row:
            if rank < 0:
                break
            path = (*path, rank)
            counts[path] += 1
    return {path: count / len(positions) for path, count in counts.items()}
