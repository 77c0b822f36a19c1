"""Pinned host memory: the host fills the inputs of calls into it, and their results land in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...files.manifest import Manifest
from .. import step_io
from ..step_arrays import StepInputs
from ..step_plan import SlotResult, SlotRows
from .buffers import StepLayout, aligned
from .cuda import Cuda, DeviceMemory, PinnedMemory

KEPT_BYTES = 256 << 20
"""Host memory for optional outputs that stays between runs. A larger plan's memory is freed in the next run."""


@dataclass(slots=True)
class DeviceInputs(StepInputs):
    """Small inputs of the device graph.

    ``fill`` and ``rest`` take the rows to move as rows of the step before. They become ``kept`` and ``kept_count``; ``commit``
    stays empty. ``draft_slots``: candidates that fill the next step.
    """

    kept: np.ndarray
    kept_count: np.ndarray
    draft_slots: np.ndarray

    def _place(self, index: int, length: int, moves: tuple[int, ...]) -> None:
        self.write_index[index] = self.margin + length
        self.kept_count[index] = len(moves)
        self.kept[index] = 0  # rows past the count are gathered too: they must exist in the step before
        self.kept[index, : len(moves)] = moves


@dataclass(frozen=True, slots=True)
class Staged:
    """The inputs of one kind of call. ``inputs`` are views of ``per_shape`` and ``per_step``, which one copy each uploads."""

    layout: StepLayout
    inputs: DeviceInputs
    per_shape: PinnedMemory
    per_step: PinnedMemory

    @classmethod
    def over(cls, layout: StepLayout, per_shape: PinnedMemory, per_step: PinnedMemory, margin: int) -> Staged:
        """Makes the inputs over two blocks. The last ``logit_rows`` rows get logits."""
        views = {**layout.per_shape.views(per_shape.bytes), **layout.inputs.views(per_step.bytes)}
        commit = np.zeros((layout.slots, 0), np.int64)
        inputs = DeviceInputs(commit=commit, margin=margin, **views)
        inputs.logit_rows[:] = np.arange(layout.rows - layout.logit_rows, layout.rows)
        return cls(layout, inputs, per_shape, per_step)


class HostSide:
    """Inputs of every kind of call: steps of each number of ``rows``, and prompt chunks of up to ``chunk`` tokens."""

    def __init__(self, cuda: Cuda, manifest: Manifest, slots: int, rows: Iterable[int], chunk: int) -> None:
        self._cuda, self._slots = cuda, slots
        self._heads, self._top_k = manifest.heads.num_heads, manifest.heads.top_k
        self._steps = {count: self._staged(self.step_layout(count)) for count in rows}
        self._prompt = self._staged(self.prompt_layout(chunk))

    def step_layout(self, rows: int) -> StepLayout:
        """Returns the layout of a step of ``rows`` rows over all slots."""
        return StepLayout.of(self._slots, rows, rows, self._heads, self._top_k)

    def prompt_layout(self, rows: int) -> StepLayout:
        """Returns the layout of a prompt chunk of ``rows`` tokens: one slot, logits of the last row."""
        return StepLayout.of(1, rows, 1, self._heads, self._top_k)

    def step(self, rows: int) -> Staged:
        """Returns the inputs of a step over all slots: the same object every time."""
        return self._steps[rows]

    def prompt(self, rows: int) -> Staged:
        """Makes the inputs of a prompt chunk. Chunks of all lengths share one block, so this overwrites the chunk before."""
        layout, whole = self.prompt_layout(rows), self._prompt
        assert rows <= whole.layout.rows, f"a chunk of {rows} tokens, the engine takes up to {whole.layout.rows}"
        staged = Staged.over(layout, whole.per_shape, whole.per_step, self._heads)
        staged.inputs.draft_slots[:] = 0
        return staged

    def _staged(self, layout: StepLayout) -> Staged:
        per_shape, per_step = (self._cuda.pinned(block.nbytes, "inputs of steps") for block in (layout.per_shape, layout.inputs))
        return Staged.over(layout, per_shape, per_step, self._heads)


@dataclass(slots=True)
class Landing:
    """Where one call's inputs and results land: a block per step in ``memory``. Two events time the call.

    ``number``: which of the executor's steps landed here, counted from 1. ``heads``: rows that its heads ran at. ``sums``: the
    engine tells NaN by ``state_sum``.
    """

    memory: PinnedMemory
    start: Any
    end: Any
    sums: bool
    number: int = 0
    heads: int = 1
    views: Mapping[str, np.ndarray] = field(default_factory=dict)
    _by_rows: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def allocate(cls, cuda: Cuda, nbytes: int, *, sums: bool) -> Landing:
        """Allocates a place for blocks per step of up to ``nbytes`` bytes."""
        return cls(cuda.pinned(nbytes, "results of steps"), cuda.event(), cuda.event(), sums)

    def expect(self, layout: StepLayout) -> None:
        """Reads the place as a block of ``layout`` from now on."""
        if layout.rows not in self._by_rows:
            self._by_rows[layout.rows] = layout.per_step.views(self.memory.bytes)
        self.views = self._by_rows[layout.rows]

    def result(self, index: int, rows: SlotRows, seconds: float, optional: Mapping[str, np.ndarray]) -> SlotResult:
        """Reads entry ``index`` of the batch as the result of ``rows``.

        The sum of the accepted state tells NaN. An engine of an older graph has none and runs its heads in every step: there
        their log-probabilities tell it.
        """
        views, wants_heads = self.views, rows.wanted.heads
        log_probs = views[step_io.LOG_PROBS][index]
        told = views[step_io.STATE_SUM][index] if self.sums else log_probs[0, 0]
        return SlotResult(
            last_row=int(views[step_io.LAST_ROW][index]),
            next_token=int(views[step_io.NEXT_TOKEN][index]),
            finite=math.isfinite(told) if self.sums else not math.isnan(told),
            candidates=views[step_io.CANDIDATES][index] if wants_heads else None,
            log_probs=log_probs if wants_heads else None,
            logits=optional.get(step_io.LOGITS),
            hidden=optional.get(step_io.HIDDEN),
            seconds=seconds,
        )


class OptionalOutputs:
    """Logits and hidden states on the host. A plan's slots get the rows that they want and nothing else, in one block.

    The block grows to the largest plan, in powers of two. At most ``KEPT_BYTES`` of it stay for the next run.
    """

    def __init__(self, cuda: Cuda, manifest: Manifest, device: Mapping[str, DeviceMemory]) -> None:
        self._cuda, self._device = cuda, device
        self._dtype = np.dtype(manifest.dtype)
        self._widths = {step_io.LOGITS: manifest.backbone.vocab_size, step_io.HIDDEN: manifest.backbone.hidden_size}
        self._memory: PinnedMemory | None = None
        self._views: dict[int, dict[str, np.ndarray]] = {}

    def reserve(self, active: Iterable[SlotRows]) -> None:
        """Makes room for the wanted outputs of all ``active`` rows. What earlier runs delivered is gone.

        Raises:
            DeviceMemoryError: the host refused the allocation.
        """
        self._views = {}
        self._release(KEPT_BYTES)
        wanted = [(rows, name) for rows in active for name in self._widths if getattr(rows.wanted, name)]
        if not wanted:
            return
        sizes = [(1 if rows.prefills else rows.count, self._widths[name]) for rows, name in wanted]
        nbytes = [count * width * self._dtype.itemsize for count, width in sizes]
        block, offset = self._block(sum(map(aligned, nbytes))), 0
        for (rows, name), size, taken in zip(wanted, sizes, nbytes, strict=True):
            view = block[offset : offset + taken].view(self._dtype).reshape(size)
            self._views.setdefault(rows.slot, {})[name] = view
            offset += aligned(taken)

    def of(self, slot: int) -> Mapping[str, np.ndarray]:
        """Returns what ``slot`` wants, by name: logits [R, V], hidden [R, H]."""
        return self._views.get(slot, {})

    def download(self, index: int, slot: int, logit_rows: int, stream: Any) -> None:
        """Enqueues the copies of what ``slot`` wants; it is entry ``index`` of a call with ``logit_rows`` rows of logits."""
        for name, view in self.of(slot).items():
            source = self._device[name].address + index * logit_rows * self._widths[name] * self._dtype.itemsize
            self._cuda.download(view.ctypes.data, source, view.nbytes, stream)

    def _block(self, nbytes: int) -> np.ndarray:
        self._release(KEPT_BYTES, at_least=nbytes)
        if self._memory is None:
            rounded = 1 << (nbytes - 1).bit_length()
            self._memory = self._cuda.pinned(rounded if rounded <= KEPT_BYTES else nbytes, "logits and hidden states")
        return self._memory.bytes

    def _release(self, at_most: int, at_least: int = 0) -> None:
        """Frees the block unless it has a size in between."""
        if self._memory is not None and not at_least <= len(self._memory.bytes) <= at_most:
            self._cuda.free(self._memory)
            self._memory = None
