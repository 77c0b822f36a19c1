"""Inputs of the CPU graphs: what follows from a slot's rows is worked out on the host, where it costs less than in the graph.

In the graph these were some sixty operators on a few numbers each, started one by one; here they are a few assignments, and
those that depend on the shape of the tree alone are skipped while it stays.
"""

from __future__ import annotations

import numpy as np

from ..tree import Shape
from . import step_io
from .step_plan import SlotRows


class CpuInputs:
    """Arrays of one slot's calls with N rows; all but the mask stay where they are.

    R is N, or 1 in prefill: of a prompt every row is accepted, and the last one's logits are all there are.
    """

    def __init__(self, rows: int, logit_rows: int, margin: int, dtype: str) -> None:
        self._margin, self._dtype = margin, dtype
        self._all_rows = logit_rows == rows
        self._shape: Shape | None = None
        self.tokens = np.zeros((1, rows), np.int64)
        self.positions = np.zeros((1, rows), np.int64)
        self.logit_rows = np.arange(rows - logit_rows, rows, dtype=np.int64)[None]
        self.mask = np.zeros((1, 1, rows, 0), dtype)
        self.visible = np.zeros((), np.int32)
        self.last_rows = np.zeros(1, np.int32)
        self.parents = np.zeros((1, rows), np.int64)
        self.paths = np.zeros((1, rows, logit_rows), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the larger arrays."""
        return int(self.mask.nbytes + self.paths.nbytes)

    def show(self, visible: int) -> None:
        """Make room for a mask over ``visible`` cache rows: a new array."""
        self.mask = np.zeros((1, 1, self.tokens.shape[1], visible), self._dtype)
        self.mask[..., : self._margin] = step_io.HIDDEN_BIAS
        self.visible[()] = visible

    def fill(self, rows: SlotRows, length: int, moves: tuple[int, ...] = ()) -> None:  # noqa: ARG002 - rows were moved before
        """Encode ``rows`` behind ``length`` kept rows.

        Mask columns behind them keep their values: attention doesn't read those.
        """
        shape, margin, start = rows.shape, self._margin, self._margin + length
        end = start + rows.count
        self.tokens[0] = rows.tokens
        np.add(shape.depths, length, out=self.positions[0])
        if self._all_rows and shape is not self._shape:
            assert rows.forced == 1, "rows below the root are drafted"
            self._shape = shape
            np.maximum(shape.parents, 0, out=self.parents[0])
            self.paths[0] = shape.on_path
        mask = self.mask[0, 0]
        mask[:, margin:start] = 0
        np.multiply(shape.unrelated, step_io.HIDDEN_BIAS, out=mask[:, start:end], casting="unsafe")
        self.last_rows[0] = end - 1
