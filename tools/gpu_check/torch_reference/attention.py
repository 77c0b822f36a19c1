"""Attention of a step's rows over the visible cache, in two ways whose speed depends on the number of rows.

Both take and return

    query       [B, heads, N, D_h]
    key, value  [B, H_kv, T, D_h]
    mask        [B, 1, N, T], additive
    result      [B, N, heads·D_h]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Run torch's fused kernels. A group of query heads becomes rows of its key head."""
    grouped, mask = _grouped(query, key, mask)
    return _rows_first(functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask), query)


def product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Run two batched products around a softmax. For few rows these fill more of a GPU than one block for each head does."""
    grouped, mask = _grouped(query, key, mask)
    scores = torch.matmul(grouped, key.transpose(2, 3)) * query.shape[-1] ** -0.5 + mask
    return _rows_first(torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value), query)


def _grouped(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    slots, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    if groups == 1:
        return query, mask
    return query.reshape(slots, key.shape[1], groups * rows, width), mask.repeat(1, 1, groups, 1)


def _rows_first(attended: Tensor, query: Tensor) -> Tensor:
    slots, heads, rows, width = query.shape
    return attended.reshape(slots, heads, rows, width).transpose(1, 2).reshape(slots, rows, heads * width)
