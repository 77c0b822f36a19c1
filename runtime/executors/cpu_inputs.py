"""What a CPU graph reads of a step instead of ancestors, forced rows and columns: worked out on the host.

In the graph these were some sixty operators on a few numbers each, started one by one; here they are a few assignments, and
what depends on the shape of the tree alone is remembered.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from . import step_io
from .executor import CacheLayout, StepBuffers


class CpuInputs:
    """Arrays of the inputs in ``step_io.CPU_INPUTS`` for steps over the same buffers; all but the mask stay where they are."""

    def __init__(self, buffers: StepBuffers, layout: CacheLayout) -> None:
        slots, rows = buffers.tokens.shape
        logit_rows = buffers.logit_rows.shape[1]
        self._margin = buffers.margin
        self._dtype = layout.dtype
        self._all_rows = logit_rows == rows
        self._bound: list[_TreeInputs | None] = [None] * slots
        self.mask = np.zeros((slots, 1, rows, 0), layout.dtype)
        self.visible = np.zeros((), np.int32)
        self.last_rows = np.zeros(slots, np.int32)
        self.parents = np.zeros((slots, rows), np.int64)
        self.paths = np.zeros((slots, rows, logit_rows), np.float32)

    def show(self, visible: int) -> None:
        """Make room for a mask over ``visible`` cache rows: a new array."""
        slots, _, rows, _ = self.mask.shape
        self.mask = np.zeros((slots, 1, rows, visible), self._dtype)
        self.mask[..., : self._margin] = step_io.HIDDEN_BIAS
        self.visible[()] = visible

    def fill(self, buffers: StepBuffers) -> None:
        """Say what ``buffers`` say. Columns past a slot's rows keep what they had: the attention doesn't read them."""
        rows, margin = buffers.rows, self._margin
        for slot, (start, forced) in enumerate(zip(buffers.write_index.tolist(), buffers.forced.tolist(), strict=True)):
            if self._all_rows:
                assert forced <= 1, "rows below the root are drafted"
                tree = _tree_inputs(buffers.ancestors[slot].tobytes(), rows, forced)
                if tree is not self._bound[slot]:
                    self._bound[slot], self.parents[slot], self.paths[slot] = tree, tree[1], tree[2]
                bias = tree[0]
            else:  # of a prompt every row is accepted, and the last one's logits are all there are: no parents, no paths
                bias = _bias(buffers.ancestors[slot])
            mask = self.mask[slot, 0]
            mask[:, margin:start] = 0
            mask[:, start : start + rows] = bias
            self.last_rows[slot] = start + rows - 1


_TreeInputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@lru_cache(maxsize=1024)
def _tree_inputs(ancestors: bytes, rows: int, forced: int) -> _TreeInputs:
    """Of one slot: its part of the mask [N, N], its parents [N] and its paths [N, N]."""
    related = np.frombuffer(ancestors, bool).reshape(rows, rows)
    order = np.arange(rows)
    # Rows are in breadth order: the parent is the last of the proper ancestors.
    parents = np.where(related & (order != order[:, None]), order, 0).max(1)
    paths = related.T.astype(np.float32)
    paths[:forced] = 0
    return _bias(related), parents, paths


def _bias(ancestors: np.ndarray) -> np.ndarray:
    return np.where(ancestors, np.float32(0), np.float32(step_io.HIDDEN_BIAS))
