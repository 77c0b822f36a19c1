"""Inputs of the CPU graphs: what follows from a slot's rows is worked out on the host, where it costs less than in the graph.

In the graph these were some sixty operators on a few numbers each, started one by one; here they are a few assignments, and
those that depend on the shape of the tree alone are skipped while it stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..tree import Shape
from . import step_io
from .step_plan import SlotRows


class CpuInputs:
    """Arrays of calls with N rows of one slot, or one row of several; all but the masks stay where they are.

    R is N, or 1 in prefill: of a prompt every row is accepted, and the last one's logits are all there are.
    ``windows``: names of the graph's masks, each with its window. ``masks``: by name.
    """

    def __init__(
        self, rows: int, logit_rows: int, margin: int, dtype: str, windows: Mapping[str, int | None], slots: int = 1
    ) -> None:
        self._margin, self._dtype = margin, dtype
        self._all_rows = logit_rows == rows
        self._windows = windows
        self._shape: Shape | None = None
        self.tokens = np.zeros((slots, rows), np.int64)
        self.positions = np.zeros((slots, rows), np.int64)
        self.logit_rows = np.tile(np.arange(rows - logit_rows, rows, dtype=np.int64), (slots, 1))
        self.masks = {name: np.zeros((slots, 1, rows, 0), dtype) for name in windows}
        self.visible = np.zeros((), np.int32)
        self.last_rows = np.zeros(slots, np.int32)
        self.parents = np.zeros((slots, rows), np.int64)
        self.paths = np.zeros((slots, rows, logit_rows), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the larger arrays."""
        return int(self.paths.nbytes) + sum(mask.nbytes for mask in self.masks.values())

    def show(self, visible: int) -> None:
        """Make room for masks over ``visible`` cache rows: new arrays."""
        for name in self.masks:
            self.masks[name] = mask = np.zeros((len(self.tokens), 1, self.tokens.shape[1], visible), self._dtype)
            mask[..., : self._margin] = step_io.HIDDEN_BIAS
        self.visible[()] = visible

    def fill(
        self,
        rows: SlotRows,
        length: int,
        moves: tuple[int, ...] = (),  # noqa: ARG002 - rows were moved before
        index: int = 0,
    ) -> None:
        """Encode ``rows`` behind ``length`` kept rows, as entry ``index`` of the batch.

        Mask columns behind them keep their values: attention doesn't read those.
        """
        shape, margin, start = rows.shape, self._margin, self._margin + length
        end = start + rows.count
        self.tokens[index] = rows.tokens
        np.add(shape.depths, length, out=self.positions[index])
        if self._all_rows and shape is not self._shape:
            assert rows.forced == 1, "rows below the root are drafted"
            self._shape = shape
            np.maximum(shape.parents, 0, out=self.parents[index])
            self.paths[index] = shape.on_path
        for name, window in self._windows.items():
            fill_mask(self.masks[name][index, 0], rows.shape, margin, start, window)
        self.last_rows[index] = end - 1


def fill_mask(mask: np.ndarray, shape: Shape, margin: int, start: int, window: int | None) -> None:
    """Say in ``mask`` [N, T] what the rows of ``shape``, which begin at cache row ``start``, may look at.

    The columns of the margin are hidden already. Those behind the rows keep their values: attention doesn't read them.
    """
    hidden, end = shape.unrelated, start + len(mask)
    mask[:, margin:start] = 0
    if window is not None:
        if len(mask) > window:  # a chain of a prompt, longer than the window
            hidden = np.maximum(hidden, shape.depths[:, None] - shape.depths >= window)
        for row, depth in enumerate(shape.depths.tolist()):
            mask[row, margin : max(margin, min(start, start + depth + 1 - window))] = step_io.HIDDEN_BIAS
    np.multiply(hidden, step_io.HIDDEN_BIAS, out=mask[:, start:end], casting="unsafe")
