"""Pinned host memory: the host fills steps into it and reads results from it, also those of steps that run ahead of the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...files.manifest import Manifest
from .. import step_io
from ..executor import StepBuffers, Wanted
from .buffers import StepLayout
from .cuda import Cuda, PinnedMemory

_OPTIONAL = (step_io.LOGITS, step_io.HIDDEN)
_PURPOSE = "inputs and results"
_Blocks = tuple[PinnedMemory, PinnedMemory]


@dataclass(frozen=True, slots=True)
class Staged:
    """The host's side of one kind of call. ``buffers``, ``kept`` and ``kept_count`` are views of ``per_shape`` and ``per_step``.

    ``optional`` [name]: memory that takes an optional output which this kind of call wants.
    """

    layout: StepLayout
    buffers: StepBuffers
    per_shape: PinnedMemory
    per_step: PinnedMemory
    kept: np.ndarray
    kept_count: np.ndarray
    optional: Mapping[str, PinnedMemory]


class HostSide:
    """Buffers of every kind of call, made once: steps of each number of rows, and prompt chunks of up to ``chunk`` tokens."""

    def __init__(self, cuda: Cuda, manifest: Manifest, slots: int, rows: Iterable[int], chunk: int) -> None:
        self._cuda, self._manifest, self._slots = cuda, manifest, slots
        self._blocks = {count: self._pinned(self.step_layout(count)) for count in rows}
        self._prompt_blocks = self._pinned(self.prompt_layout(chunk))
        self._optional: dict[tuple[int, str], PinnedMemory] = {}
        self._steps: dict[tuple[int, Wanted], Staged] = {}
        self._prompts: dict[tuple[int, Wanted], Staged] = {}

    def step_layout(self, rows: int) -> StepLayout:
        """Returns the layout of a step of ``rows`` rows over all slots."""
        return StepLayout.of(self._slots, rows, rows, self._manifest.heads.num_heads, self._manifest.heads.top_k)

    def prompt_layout(self, rows: int) -> StepLayout:
        """Returns the layout of a prompt chunk of ``rows`` tokens: one slot, logits of the last row."""
        return StepLayout.of(1, rows, 1, self._manifest.heads.num_heads, self._manifest.heads.top_k)

    def step(self, rows: int, wanted: Wanted) -> Staged:
        """Returns the buffers of a step over all slots: the same object every time."""
        if (rows, wanted) not in self._steps:
            self._steps[rows, wanted] = self._stage(self.step_layout(rows), self._blocks[rows], wanted, rows)
        return self._steps[rows, wanted]

    def prompt(self, rows: int, wanted: Wanted) -> Staged:
        """Returns the buffers of a prompt chunk. Chunks of all lengths share one block, so this overwrites the chunk before."""
        if (rows, wanted) not in self._prompts:
            self._prompts[rows, wanted] = self._stage(self.prompt_layout(rows), self._prompt_blocks, wanted, 0)
        staged = self._prompts[rows, wanted]
        staged.buffers.logit_rows[0] = rows - 1
        for array in (staged.buffers.draft_slots, staged.kept, staged.kept_count):
            array[:] = 0
        return staged

    def staged(self, buffers: StepBuffers) -> Staged:
        """Finds the step that ``buffers`` belong to."""
        return next(staged for staged in self._steps.values() if staged.buffers is buffers)

    def _pinned(self, layout: StepLayout) -> _Blocks:
        per_shape, per_step = (self._cuda.pinned(block.nbytes, _PURPOSE) for block in (layout.per_shape, layout.per_step))
        return per_shape, per_step

    def _stage(self, layout: StepLayout, blocks: _Blocks, wanted: Wanted, kind: int) -> Staged:
        """Makes the buffers of one kind of call. Calls of one ``kind`` share the memory of their optional outputs."""
        per_shape, per_step = blocks
        views = {**layout.per_shape.views(per_shape.bytes), **layout.per_step.views(per_step.bytes)}
        buffers = _buffers(self._manifest, layout, wanted, views)
        buffers.logit_rows[:] = np.arange(layout.rows - layout.logit_rows, layout.rows)
        optional = {}
        for name in _OPTIONAL:
            array = getattr(buffers, name)
            if array.size:
                if (kind, name) not in self._optional:
                    self._optional[kind, name] = self._cuda.pinned(array.nbytes, name)
                optional[name] = memory = self._optional[kind, name]
                setattr(buffers, name, memory.bytes.view(array.dtype).reshape(array.shape))
        return Staged(layout, buffers, per_shape, per_step, views[step_io.KEPT], views[step_io.KEPT_COUNT], optional)


@dataclass(slots=True)
class RingEntry:
    """One place of the ring: a step in flight leaves its inputs and results in ``memory``; two events time it."""

    memory: PinnedMemory
    start: Any
    end: Any
    rows: int = 0
    _views: dict[int, StepBuffers] = field(default_factory=dict)

    @classmethod
    def allocate(cls, cuda: Cuda, nbytes: int) -> RingEntry:
        """Allocates an entry for blocks per step of up to ``nbytes`` bytes."""
        return cls(cuda.pinned(nbytes, "results of steps"), cuda.event(), cuda.event())

    def read(self, layout: StepLayout, manifest: Manifest) -> StepBuffers:
        """Reads the entry as a step of ``layout``. Equal numbers of rows give the same object."""
        if layout.rows not in self._views:
            self._views[layout.rows] = _buffers(manifest, layout, Wanted(), layout.per_step.views(self.memory.bytes))
        return self._views[layout.rows]


def _buffers(manifest: Manifest, layout: StepLayout, wanted: Wanted, views: Mapping[str, np.ndarray]) -> StepBuffers:
    """Makes the buffers of one kind of call, with the arrays of ``views`` in place of their own."""
    heads, backbone = manifest.heads, manifest.backbone
    sizes = (heads.num_heads, heads.top_k, backbone.hidden_size, backbone.vocab_size)
    buffers = StepBuffers.allocate(layout.slots, layout.rows, layout.logit_rows, *sizes, manifest.dtype, wanted)
    for name, view in views.items():
        if hasattr(buffers, name):
            setattr(buffers, name, view)
    return buffers
