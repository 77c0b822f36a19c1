"""Computes the KL divergence of a tuned backbone from the original as a loss: logits of all positions never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 256  # positions whose logits exist at a time


class _KlLoss(torch.autograd.Function):
    """Sums KL(teacher‖tuned) over rows. The gradient of a tuned row is (tuned − teacher probabilities) · weight."""

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total = torch.zeros((), device=tuned.device)
        gradient = torch.empty_like(tuned)
        for start in range(0, len(tuned), _CHUNK):
            rows = slice(start, start + _CHUNK)
            expected = functional.linear(teacher[rows], weight, bias).log_softmax(-1)
            found = functional.linear(tuned[rows], weight, bias).log_softmax(-1)
            probabilities = expected.exp()
            total += (probabilities * expected.sub_(found)).sum()
            torch.mm(found.exp_().sub_(probabilities), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def kl_loss(tuned: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the mean KL(teacher‖tuned) in nats, as :func:`..distributions.kl_divergence` does.

    ``tuned`` and ``teacher`` are hidden states [n, H]. ``weight`` [V, H] projects both. Only ``tuned`` gets a gradient.
    """
    total: Tensor = _KlLoss.apply(tuned.float(), teacher.float(), weight, bias)  # type: ignore[no-untyped-call]
    return total / len(tuned)
