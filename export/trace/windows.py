"""Reads from a model's own mask function how far its layers look back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...runtime.errors import UnsupportedArchitectureError


def window_of(visible: Callable[..., torch.Tensor], capacity: int) -> int | None:
    """Return how many tokens a row looks back, itself included; None if it sees all of ``capacity`` tokens.

    ``visible`` (batch, head, row, column) is what transformers makes masks of. Configs say it in many ways, and some have fields
    that their models don't read. So it is asked: a few rows, each at all columns.

    Raises:
        UnsupportedArchitectureError: rows see something else than the latest tokens.
    """
    asked = sorted({*range(min(4, capacity)), capacity // 3, capacity // 2, capacity - 1})
    with _disable_current_modes():  # these numbers are no part of the trace
        zero, columns, rows = torch.zeros(1, 1, dtype=torch.int64), torch.arange(capacity + 1)[None], torch.tensor(asked)[:, None]
        seen = visible(zero, zero, rows, columns).expand(len(asked), capacity + 1)
        window = int(seen[-1].sum())
        latest = (columns <= rows) & (columns > rows - window)
        if window < 1 or not bool((seen == latest).all()):
            raise UnsupportedArchitectureError(
                f"tokens attend to others than the latest ones before them, within the capacity {capacity}",
                hint="the step graph expresses attention to all earlier tokens, or to the latest ones",
            )
    return window if window < capacity else None
