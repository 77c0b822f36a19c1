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
    """Arrays of one slot's calls with N rows; all but the masks stay where they are.

    R is N, or 1 in prefill: of a prompt every row is accepted, and the last one's logits are all there are.
    ``windows``: names of the graph's masks, each with its window. ``masks``: by name.
    """

    def __init__(self, rows: int, logit_rows: int, margin: int, dtype: str, windows: Mapping[str, int | None]) -> None:
        self._margin, self._dtype = margin, dtype
        self._all_rows = logit_rows == rows
        self._windows = windows
        self._shape: Shape | None = None
        self.tokens = np.zeros((1, rows), np.int64)
        self.positions = np.zeros((1, rows), np.int64)
        self.logit_rows = np.arange(rows - logit_rows, rows, dtype=np.int64)[None]
        self.masks = {name: np.zeros((1, 1, rows, 0), dtype) for name in windows}
        self.visible = np.zeros((), np.int32)
        self.last_rows = np.zeros(1, np.int32)
        self.parents = np.zeros((1, rows), np.int64)
        self.paths = np.zeros((1, rows, logit_rows), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the larger arrays."""
        return int(self.paths.nbytes) + sum(mask.nbytes for mask in self.masks.values())

    def show(self, visible: int) -> None:
        """Make room for masks over ``visible`` cache rows: new arrays."""
        for name in self.masks:
            self.masks[name] = mask = np.zeros((1, 1, self.tokens.shape[1], visible), self._dtype)
            mask[..., : self._margin] = step_io.HIDDEN_BIAS
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
        for name, window in self._windows.items():
            fill_mask(self.masks[name][0, 0], rows.shape, margin, start, window)
        self.last_rows[0] = end - 1


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
