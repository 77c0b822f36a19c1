"""Computes the KL divergence of a tuned backbone from the original as a loss: logits of all positions never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .trainable import Change

_CHUNK = 256  # positions whose logits exist at a time


class _KlLoss(torch.autograd.Function):
    """Sums KL(teacher‖tuned) over rows.

    The gradient of a tuned row is ((tuned − teacher probabilities) · slope) · weight. ``slope``: of ``change``, 1 without one.
    """

    @staticmethod
    def forward(ctx: Any, tuned: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, change: Change | None) -> Tensor:
        total = torch.zeros((), device=tuned.device)
        gradient = torch.empty_like(tuned)
        for start in range(0, len(tuned), _CHUNK):
            rows = slice(start, start + _CHUNK)
            expected, _ = _changed(functional.linear(teacher[rows], weight, bias), change)
            found, slope = _changed(functional.linear(tuned[rows], weight, bias), change)
            expected, found = expected.log_softmax(-1), found.log_softmax(-1)
            probabilities = expected.exp()
            total += (probabilities * expected.sub_(found)).sum()
            difference = found.exp_().sub_(probabilities)
            torch.mm(difference if slope is None else difference.mul_(slope), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def _changed(logits: Tensor, change: Change | None) -> tuple[Tensor, Tensor | None]:
    """Return the logits that ``change`` makes of each of ``logits``, and its slope there."""
    if change is None:
        return logits, None
    with torch.enable_grad():
        given = logits.detach().requires_grad_()
        changed = change(given)
        (slope,) = torch.autograd.grad(changed.sum(), given)
    return changed.detach(), slope


def kl_loss(tuned: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, change: Change | None = None) -> Tensor:
    """Compute the mean KL(teacher‖tuned) in nats, as :func:`..distributions.kl_divergence` does.

    ``tuned`` and ``teacher`` are hidden states [n, H]. ``weight`` [V, H] projects both; ``change`` is what follows. Only
    ``tuned`` gets a gradient.
    """
    total: Tensor = _KlLoss.apply(tuned.float(), teacher.float(), weight, bias, change)  # type: ignore[no-untyped-call]
    return total / len(tuned)
