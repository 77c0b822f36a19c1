"""Layouts of an engine's small tensors, the same in device memory and in pinned host memory: one copy moves a whole block.

The small tensors of a step lie in two blocks::

    per shape   forced, logit_rows, draft_slots, ancestors                 the host alone writes them
    per step    tokens, positions, write_index, kept, kept_count           inputs: the device computes those of the next step
                last_row, next_token, emitted, state_sum, candidates, log_probs       results
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

_NEXT = {  # input of the block per step: the output that holds its value for the next step
    step_io.TOKENS: step_io.NEXT_TOKENS,
    step_io.POSITIONS: step_io.NEXT_POSITIONS,
    step_io.WRITE_INDEX: step_io.NEXT_WRITE_INDEX,
    step_io.KEPT: step_io.NEXT_KEPT,
    step_io.KEPT_COUNT: step_io.NEXT_KEPT_COUNT,
}


def aligned(nbytes: int) -> int:
    """Rounds ``nbytes`` up to a multiple of ``ALIGNMENT``, where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Layout:
    """A block of tensors: name, numpy dtype, shape and offset of each, and the bytes of the whole block."""

    fields: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
        """Places the tensors one after another, each at an offset that is a multiple of ``ALIGNMENT``, as TensorRT wants it."""
        fields, offset = [], 0
        for name, dtype_name, shape in tensors:
            dtype = np.dtype(dtype_name)
            fields.append((name, dtype, shape, offset))
            offset += aligned(prod(shape) * dtype.itemsize)
        return cls(tuple(fields), offset)

    def views(self, block: np.ndarray) -> dict[str, np.ndarray]:
        """Returns arrays over the bytes of ``block``, uint8 [≥ nbytes], by name."""
        return {
            name: block[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, dtype, shape, offset in self.fields
        }

    def addresses(self, base: int) -> dict[str, int]:
        """Returns the address of each tensor of a block that lies at ``base``."""
        return {name: base + offset for name, _, _, offset in self.fields}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor."""
        return {name: shape for name, _, shape, _ in self.fields}


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Layouts of a step of ``rows`` rows over ``slots`` slots. ``inputs``: the part of the block per step before the results."""

    slots: int
    rows: int
    logit_rows: int
    per_shape: Layout
    per_step: Layout
    inputs: Layout

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(slots: int, rows: int, logit_rows: int, heads: int, top_k: int) -> StepLayout:
        """Makes the layouts for K ``heads`` with ``top_k`` candidates each. Equal sizes give the same object."""
        per_shape = [
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
            (step_io.STATE_SUM, "float32", (slots,)),
            (step_io.CANDIDATES, "int64", (slots, heads, top_k)),
            (step_io.LOG_PROBS, "float32", (slots, heads, top_k)),
        ]
        return StepLayout(slots, rows, logit_rows, *map(Layout.of, (per_shape, [*inputs, *results], inputs)))

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the small inputs, without that of ``columns``."""
        return {**self.per_shape.shapes(), **self.inputs.shapes()}

    def bindings(self, per_shape: int, current: int, following: int) -> dict[str, int]:
        """Returns the addresses of the small tensors.

        ``per_shape``, ``current``: addresses of this step's two blocks. ``following``: address of the next step's block per step,
        which takes the outputs ``next_…``.
        """
        after = self.per_step.addresses(following)
        nexts = {output: after[name] for name, output in _NEXT.items()}
        return {**self.per_shape.addresses(per_shape), **self.per_step.addresses(current), **nexts}
