"""Which of each head's candidates is the token that the backbone emits: by rank, and by path of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.heads import HeadSet
from ..runtime.tree import RankPath
from .train import Examples

MISS = -1
NO_LABEL = -2


def head_logits(heads: HeadSet, head: int, hidden: Tensor, root_embedding: Tensor, projection: Tensor) -> Tensor:
    """Draft logits [n, V'] of one head, from the record's arrays; hidden and root_embedding [n, H]."""
    x = hidden
    for layer in range(heads.config.num_layers):
        weight, bias = (torch.from_numpy(array).float() for array in heads.layer(head, layer))
        grounded = heads.config.kind == "grounded" and layer == 0
        x = x + functional.silu(functional.linear(torch.cat([x, root_embedding], -1) if grounded else x, weight, bias))
    return functional.linear(x, projection)


def draft_projection(heads: HeadSet, head: int, output_weight: Tensor) -> Tensor:
    """Vocabulary projection [V', H] of one head: its own, one for all heads, or the backbone's rows in the draft vocabulary."""
    for name in (f"head.{head}.projection.weight", "projection.weight"):
        if name in heads.tensors:
            return torch.from_numpy(heads.tensors[name]).float()
    return (output_weight if heads.token_map is None else output_weight[torch.from_numpy(heads.token_map)]).float()


def hit_ranks(
    heads: HeadSet, examples: Examples, embedding: Tensor, output_weight: Tensor, ranks: int = 10, batch: int = 2048
) -> np.ndarray:
    """Rank of each position's label among the candidates of each head, int64 [n, K]; ``MISS`` or ``NO_LABEL`` where it has none.

    A label outside the draft vocabulary is a miss.
    """
    tokens = np.arange(len(output_weight)) if heads.token_map is None else heads.token_map
    token_map = torch.from_numpy(tokens)
    projections = [draft_projection(heads, head, output_weight) for head in range(heads.config.num_heads)]
    found = np.full((len(examples.roots), heads.config.num_heads), NO_LABEL)
    with torch.no_grad():
        for start in range(0, len(examples.roots), batch):
            hidden = examples.hidden[start : start + batch].float()
            roots = embedding[examples.roots[start : start + batch]].float()
            labels = examples.labels[start : start + batch]
            for head in range(heads.config.num_heads):
                top = token_map[head_logits(heads, head, hidden, roots, projections[head]).topk(ranks, -1).indices]
                hits = (top == labels[:, head : head + 1]).numpy()
                rank = np.where(hits.any(1), hits.argmax(1), MISS)
                found[start : start + batch, head] = np.where(labels[:, head].numpy() >= 0, rank, NO_LABEL)
    return found


def rates_by_rank(found: np.ndarray, ranks: int = 10) -> np.ndarray:
    """Share of positions whose label is the candidate of rank r of head h, float64 [K, ranks], from :func:`hit_ranks`.

    Each head is counted over all positions that have a label.
    """
    hits = np.stack([(found == rank).sum(0) for rank in range(ranks)], 1)
    return np.asarray(hits / np.maximum((found != NO_LABEL).sum(0), 1)[:, None])


def rates_by_path(found: np.ndarray) -> dict[RankPath, float]:
    """Share of positions whose next labels are the candidates on a path of ranks, from :func:`hit_ranks`.

    Heads hit together: where the first guess is right the second is right more often than on average, so the product of their
    rates underrates deep paths. Every path that was right at least once is here. Positions without a label for the first head
    are left out.
    """
    positions = found[found[:, 0] != NO_LABEL]
    counts: Counter[RankPath] = Counter()
    for row in positions.tolist():
        path: RankPath = ()
        for rank in row:
            if rank < 0:
                break
            path = (*path, rank)
            counts[path] += 1
    return {path: count / len(positions) for path, count in counts.items()}
