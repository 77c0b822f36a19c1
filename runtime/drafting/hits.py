"""Counts how often heads are right: by rank, by path of ranks, and by the tokens that a tree accepts in replayed answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..tree import RankPath, Tree

MISS = -1
NO_LABEL = -2


def ranks_of(candidates: np.ndarray, labels: Sequence[int]) -> list[int]:
    """Return each head's rank of its label among its candidates int64 [K, k]: ``MISS`` without one, ``NO_LABEL`` past the end."""
    ranks = []
    for head, tokens in enumerate(candidates.tolist()):
        if head >= len(labels):
            ranks.append(NO_LABEL)
        else:
            ranks.append(tokens.index(labels[head]) if labels[head] in tokens else MISS)
    return ranks


def rank_rates(ranks: np.ndarray, top_k: int) -> np.ndarray:
    """Return the share of positions whose label is the candidate of rank r of head h, float64 [K, top_k].

    ``ranks`` int64 [n, K]: ranks of each position's labels. Each head is counted over all positions that have a label.
    """
    hits = np.stack([(ranks == rank).sum(0) for rank in range(top_k)], 1)
    return np.asarray(hits / np.maximum((ranks != NO_LABEL).sum(0), 1)[:, None])


def path_rates(ranks: np.ndarray) -> dict[RankPath, float]:
    """Return the share of positions whose next labels are the candidates on a path of ranks; ``ranks`` int64 [n, K].

    Heads hit together: behind a right first guess the second one is right more often than on average, so the product of their
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


def accepted_lengths(tree: Tree, ranks: np.ndarray) -> np.ndarray:
    """Return the drafted tokens that a step of ``tree`` accepts at each position, int64 [n]; ``ranks`` int64 [n, K]."""
    right = np.ones((tree.rows, len(ranks)), bool)
    for row in range(1, tree.rows):
        right[row] = right[tree.parents[row]] & (ranks[:, tree.depths[row] - 1] == tree.ranks[row])
    return np.asarray((right * tree.depths[:, None]).max(0))


def replayed_acceptance_length(tree: Tree, ranks: np.ndarray) -> float:
    """Return the mean tokens a step if ``tree`` had decoded the recorded answers.

    ``ranks`` int64 [n, K]: ranks of the labels of every emitted token in order, answer after answer. The last token of an answer
    has no label. A step at position p that accepts a tokens is followed by one at p + 1 + a. Decoding leaps over tokens that were
    easy to guess, so the mean over all positions is higher: by 2.4 to 3.5 % in docs/trees.md.

    Steps near the end of an answer aren't counted when a label within the tree's depth is missing: nobody knows their outcome.
    If no answer is longer than that, they are counted, and tokens past the end count as not accepted.
    """
    accepted = accepted_lengths(tree, ranks).tolist()
    known = (ranks[:, : max(1, tree.depth)] != NO_LABEL).all(1)
    known = (known if known.any() else ranks[:, 0] != NO_LABEL).tolist()
    position = steps = tokens = 0
    while position < len(known):
        emitted = 1 + accepted[position] if known[position] else 0
        steps += emitted > 0
        tokens += emitted
        position += max(1, emitted)
    return tokens / steps if steps else 1.0
