"""Second moments of what products read: how errors of one input's weights can be taken back by the others (GPTQ)."""

from __future__ import annotations

import numpy as np


class MomentObserver:
    """The sum of xᵀx over the vectors x [C] of an activation [..., C], in float32."""

    def __init__(self, channels: int) -> None:
        self.total = np.zeros((channels, channels), np.float32)
        self.rows = 0

    def observe(self, values: np.ndarray) -> None:
        """Take in values [..., C]."""
        rows = values.reshape(-1, len(self.total)).astype(np.float32, copy=False)
        self.total += rows.T @ rows
        self.rows += len(rows)

    def moments(self) -> np.ndarray:
        """E[xᵀx], float32 [C, C]."""
        mean: np.ndarray = self.total / np.float32(max(self.rows, 1))
        return mean
