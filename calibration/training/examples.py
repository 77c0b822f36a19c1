"""Makes the examples that heads learn from: hidden states, roots, the tokens that follow, and the draft vocabulary.

Position i of an answer has the hidden state that emitted token i. Head k's label is token i + 1 + k.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.errors import TrainingError
from ..answers.answers import iter_shards

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Examples:
    """Holds ``hidden`` float16 [n, H], ``roots`` int64 [n], ``labels`` int64 [n, K]: ids, IGNORE past the end of an answer."""

    hidden: Tensor
    roots: Tensor
    labels: Tensor


def load_examples(folder: Path, num_heads: int) -> Examples:
    """Read the examples of all answers in ``folder``.

    Raises:
        TrainingError: there are none.
    """
    hidden, roots, labels = [], [], []
    for shard in iter_shards(folder):
        for answer in shard:
            hidden.append(answer.hidden)
            roots.append(answer.tokens)
            labels.append(following_tokens(answer.tokens, num_heads))
    if not hidden:
        raise TrainingError(f"{folder} holds no answers", hint="generate them first")
    return Examples(*(torch.from_numpy(np.concatenate(part)) for part in (hidden, roots, labels)))


def following_tokens(tokens: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the labels int64 [n, K] of an answer's n tokens: the tokens 1 to K places on, IGNORE past the end."""
    padded = np.concatenate([tokens, np.full(num_heads, IGNORE)])
    return np.lib.stride_tricks.sliding_window_view(padded[1:], num_heads)[: len(tokens)]


def draft_vocabulary(tokens: Tensor, size: int) -> Tensor:
    """Choose the ``size`` most frequent token ids (ties: smaller id first), ascending, int64 [≤ size]."""
    values, counts = torch.unique(tokens[tokens >= 0], return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)[:size]
    return torch.sort(values[order])[0]


def draft_indices(token_map: Tensor, vocab_size: int) -> Tensor:
    """Map every token id to its index in the draft vocabulary, int64 [V]; IGNORE for tokens that it lacks."""
    indices = torch.full((vocab_size,), IGNORE)
    indices[token_map] = torch.arange(len(token_map))
    return indices


def draft_labels(labels: Tensor, to_draft: Tensor) -> Tensor:
    """Turn ``labels`` (token ids or IGNORE) into indices of the draft vocabulary. ``to_draft``: see :func:`draft_indices`."""
    return torch.where(labels >= 0, to_draft[labels.clamp(min=0)], IGNORE)


def root_mean_square(rows: Tensor) -> Tensor:
    """Compute the root mean square of each dimension of ``rows`` [n, H], float32 [H]; 1 where a dimension is always 0."""
    total = torch.zeros(rows.shape[1])
    for start in range(0, len(rows), 4096):  # a float32 copy of all rows would be the largest thing in memory
        total += rows[start : start + 4096].float().square().sum(0)
    size = (total / len(rows)).sqrt()
    return torch.where(size > 0, size, torch.ones(()))
