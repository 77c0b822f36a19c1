"""Pinned host memory that steps are filled into and read from: by the host itself, and by steps that run ahead of it."""

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
_Parts = tuple[PinnedMemory, PinnedMemory]


@dataclass(frozen=True, slots=True)
class Staged:
    """Host side of one kind of call: ``buffers`` lie in pinned memory, ``kept`` and ``kept_count`` beside them.

    ``optional``: where the outputs go that are wanted, by name.
    """

    layout: StepLayout
    buffers: StepBuffers
    fixed: PinnedMemory
    moving: PinnedMemory
    kept: np.ndarray
    kept_count: np.ndarray
    optional: Mapping[str, PinnedMemory]


class HostSide:
    """Buffers of every kind of call, made once: steps of each number of rows, and prompts of up to ``chunk`` tokens."""

    def __init__(self, cuda: Cuda, manifest: Manifest, slots: int, rows: Iterable[int], chunk: int) -> None:
        self._cuda, self._manifest, self._slots = cuda, manifest, slots
        self._parts = {count: self._pinned(self.step_layout(count)) for count in rows}
        self._prompt_parts = self._pinned(self.prompt_layout(chunk))
        self._optional: dict[tuple[int, str], PinnedMemory] = {}
        self._steps: dict[tuple[int, Wanted], Staged] = {}
        self._prompts: dict[tuple[int, Wanted], Staged] = {}

    def step_layout(self, rows: int) -> StepLayout:
        """Of a step over all slots."""
        return StepLayout.of(self._slots, rows, rows, self._manifest.heads.num_heads, self._manifest.heads.top_k)

    def prompt_layout(self, rows: int) -> StepLayout:
        """Of a piece of a prompt: one slot, the last row's logits."""
        return StepLayout.of(1, rows, 1, self._manifest.heads.num_heads, self._manifest.heads.top_k)

    def step(self, rows: int, wanted: Wanted) -> Staged:
        """A step over all slots; the same object every time."""
        if (rows, wanted) not in self._steps:
            self._steps[rows, wanted] = self._stage(self.step_layout(rows), self._parts[rows], wanted, rows)
        return self._steps[rows, wanted]

    def prompt(self, rows: int, wanted: Wanted) -> Staged:
        """A piece of a prompt. All lengths share one block: what was in it is gone."""
        if (rows, wanted) not in self._prompts:
            self._prompts[rows, wanted] = self._stage(self.prompt_layout(rows), self._prompt_parts, wanted, 0)
        staged = self._prompts[rows, wanted]
        staged.buffers.logit_rows[0] = rows - 1
        for array in (staged.buffers.draft_slots, staged.kept, staged.kept_count):
            array[:] = 0
        return staged

    def staged(self, buffers: StepBuffers) -> Staged:
        """The step that has these buffers."""
        return next(staged for staged in self._steps.values() if staged.buffers is buffers)

    def _pinned(self, layout: StepLayout) -> _Parts:
        fixed, moving = (self._cuda.pinned(part.nbytes, "inputs and results") for part in (layout.fixed, layout.moving))
        return fixed, moving

    def _stage(self, layout: StepLayout, parts: _Parts, wanted: Wanted, kind: int) -> Staged:
        """``kind``: calls of one kind share memory for their optional outputs."""
        fixed, moving = parts
        views = {**layout.fixed.views(fixed.bytes), **layout.moving.views(moving.bytes)}
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
        return Staged(layout, buffers, fixed, moving, views[step_io.KEPT], views[step_io.KEPT_COUNT], optional)


@dataclass(slots=True)
class RingSlot:
    """Where a step in flight leaves its inputs and results for the host, and when it began and ended."""

    memory: PinnedMemory
    start: Any
    end: Any
    rows: int = 0
    _views: dict[int, StepBuffers] = field(default_factory=dict)

    @classmethod
    def allocate(cls, cuda: Cuda, nbytes: int) -> RingSlot:
        """For moving parts of up to ``nbytes`` bytes."""
        return cls(cuda.pinned(nbytes, "results of steps"), cuda.event(), cuda.event())

    def read(self, layout: StepLayout, manifest: Manifest) -> StepBuffers:
        """The slot as a step of ``layout``; the same object for the same number of rows."""
        if layout.rows not in self._views:
            self._views[layout.rows] = _buffers(manifest, layout, Wanted(), layout.moving.views(self.memory.bytes))
        return self._views[layout.rows]


def _buffers(manifest: Manifest, layout: StepLayout, wanted: Wanted, views: Mapping[str, np.ndarray]) -> StepBuffers:
    """Buffers of one kind of call, those of ``views`` in the place of their own."""
    heads, backbone = manifest.heads, manifest.backbone
    sizes = (heads.num_heads, heads.top_k, backbone.hidden_size, backbone.vocab_size)
    buffers = StepBuffers.allocate(layout.slots, layout.rows, layout.logit_rows, *sizes, manifest.dtype, wanted)
    for name, view in views.items():
        if hasattr(buffers, name):
            setattr(buffers, name, view)
    return buffers
