"""A synthetic task that heads can learn perfectly: the tokens after a root are functions of the token at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from medusa_deploy.calibration.hit_rates import find_hits
from medusa_deploy.calibration.training.examples import Examples
from medusa_deploy.calibration.training.train import TrainConfig
from medusa_deploy.runtime.drafting.hits import rank_rates

VOCAB, HIDDEN, HEADS = 16, 32, 2
CONFIG = TrainConfig(
    kind="medusa", num_heads=HEADS, draft_vocab_size=VOCAB, epochs=6, batch_size=64, learning_rate=2e-2, dropout=0.1
)


def backbone(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and output weight [V, H]: orthogonal rows, unrelated to each other."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(4 * torch.linalg.qr(torch.randn(HIDDEN, VOCAB, generator=generator))[0].T.contiguous() for _ in range(2))


def examples(count: int = 64 * 20, *, told_by: str = "hidden", seed: int = 0) -> Examples:
    """Labels depend on one token, which the hidden state shows (``told_by="hidden"``) or which is the root (``"root"``)."""
    generator = torch.Generator().manual_seed(seed)
    _, output_weight = backbone()
    token, other = (torch.randint(0, VOCAB, (count,), generator=generator) for _ in range(2))
    shown, roots = (token, other) if told_by == "hidden" else (other, token)
    hidden = output_weight[shown] + 0.1 * torch.randn(count, HIDDEN, generator=generator)
    labels = torch.stack([(token * 3 + 5 + head) % VOCAB for head in range(HEADS)], 1)
    return Examples(hidden.half(), roots, labels)


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two head sets hold the same bytes."""
    tensors, others = one.tensors, other.tensors
    return tensors.keys() == others.keys() and all(tensors[name].tobytes() == others[name].tobytes() for name in tensors)


def hit_rates(*arguments: Any, ranks: int, **options: Any) -> np.ndarray:
    """Hit rates [K, ranks] of heads on examples: the two halves of counting them in one call."""
    return rank_rates(find_hits(*arguments, ranks=ranks, **options).ranks, ranks)
