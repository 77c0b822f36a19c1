"""Where an engine's small tensors lie: the same layout in device memory and in pinned host memory, so that one copy moves all.

A step's tensors fall into two parts. The *fixed* part says what kind of step it is and is written by the host alone. The
*moving* part is what changes from step to step: first the inputs that the device can compute for itself, then the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from .. import step_io

ALIGNMENT = 256

_NEXT = {  # input of the moving part: the output that is its next value
    step_io.TOKENS: step_io.NEXT_TOKENS,
    step_io.POSITIONS: step_io.NEXT_POSITIONS,
    step_io.WRITE_INDEX: step_io.NEXT_WRITE_INDEX,
    step_io.KEPT: step_io.NEXT_KEPT,
    step_io.KEPT_COUNT: step_io.NEXT_KEPT_COUNT,
}


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors in one block: name, numpy dtype, shape and offset of each, and the block's bytes."""

    fields: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
        """One after another, each where TensorRT may read it."""
        fields, offset = [], 0
        for name, dtype_name, shape in tensors:
            dtype = np.dtype(dtype_name)
            fields.append((name, dtype, shape, offset))
            offset += aligned(prod(shape) * dtype.itemsize)
        return cls(tuple(fields), offset)

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays over the bytes of ``block``, uint8 [≥ nbytes]."""
        return {
            name: block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, dtype, shape, offset in self.fields
        }

    def addresses(self, base: int) -> dict[str, int]:
        """Address of each tensor of a block at ``base``."""
        return {name: base + offset for name, _, _, offset in self.fields}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: shape for name, _, shape, _ in self.fields}


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Layouts of a step of ``rows`` rows over ``slots`` slots. ``moving_inputs``: bytes of the moving part before its results."""

    slots: int
    rows: int
    logit_rows: int
    fixed: Layout
    moving: Layout
    moving_inputs: int

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(slots: int, rows: int, logit_rows: int, heads: int, top_k: int) -> StepLayout:
        """For K ``heads`` with ``top_k`` candidates each; equal sizes give the same object."""
        fixed = [
            (step_io.FORCED, "int64", (slots,)),
            (step_io.LOGIT_ROWS, "int64", (slots, logit_rows)),
            (step_io.DRAFT_SLOTS, "int64", (slots, rows)),
            (step_io.ANCESTORS, "bool", (slots, rows, rows)),
        ]
        inputs = [
            (step_io.TOKENS, "int64", (slots, rows)),
            (step_io.POSITIONS, "int64", (slots, rows)),
            (step_io.WRITE_INDEX, "int64", (slots,)),
            (step_io.KEPT, "int64", (slots, heads)),
            (step_io.KEPT_COUNT, "int64", (slots,)),
        ]
        results = [
            (step_io.LAST_ROW, "int64", (slots,)),
            (step_io.NEXT_TOKEN, "int64", (slots,)),
            (step_io.EMITTED, "int64", (slots, heads + 1)),
            (step_io.CANDIDATES, "int64", (slots, heads, top_k)),
            (step_io.LOG_PROBS, "float32", (slots, heads, top_k)),
        ]
        split = Layout.of(inputs).nbytes
        return StepLayout(slots, rows, logit_rows, Layout.of(fixed), Layout.of([*inputs, *results]), split)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the small inputs, ``columns`` excepted."""
        moving = self.moving.shapes()
        return {**self.fixed.shapes(), **{name: moving[name] for name in _NEXT}}

    def bindings(self, fixed: int, moving: int, following: int) -> dict[str, int]:
        """Addresses of the small tensors; the next step's inputs are written to the block at ``following``."""
        after = self.moving.addresses(following)
        nexts = {output: after[name] for name, output in _NEXT.items()}
        return {**self.fixed.addresses(fixed), **self.moving.addresses(moving), **nexts}
