"""ONNX Runtime on the CPU: I/O binding over caches that are bound once and updated in place."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..drafting.lookup import DEEPEST
from . import step_io
from .cpu_inputs import CpuInputs
from .executor import StepBuffers, Wanted, visible_rows
from .ort_base import CPU_PROVIDER, OrtBase, OrtModel, import_onnxruntime, small_outputs

__all__ = ["Bound", "OrtExecutor", "OrtModel"]


@dataclass(slots=True)
class Bound:
    """A binding, what the host works out for it (None: the graph does), and how many cache rows it shows."""

    io: Any
    cpu: CpuInputs | None
    visible: int = 0


class OrtExecutor(OrtBase):
    """Runs a step graph with ONNX Runtime's CPU provider.

    Caches live in one array [2·layers, slots, H_kv, S, D_h]; the past input and the present output of a layer are the same
    bytes of it, which is what makes the graph's cache writes happen in place. Graphs without the ``commit`` input
    (the CPU variant) have their accepted rows moved here, by one indexed copy over all layers.
    """

    def __init__(self, model: OrtModel, threads: int | None = None) -> None:
        """Load the engine and allocate the caches.

        Raises:
            MissingDependencyError: onnxruntime isn't installed.
            ProviderError: another provider than the CPU's answered.
        """
        super().__init__(model, import_onnxruntime("cpu"), (CPU_PROVIDER, {}), threads)
        layout = model.layout
        shape = (2 * layout.layers, layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        self.caches = np.zeros(shape, layout.dtype)
        self._cache_values = [self._value(cache) for cache in self.caches]
        if step_io.COMMIT not in self._inputs:  # rows are moved here, as many as there are
            self.deepest = max(DEEPEST, model.num_heads)
        self._columns = np.arange(layout.rows, dtype=np.int64)
        self._column_values: dict[int, Any] = {}
        self._truth = np.array([False, True])
        self._answers = [self._value(self._truth[answer : answer + 1].reshape(())) for answer in range(2)]

    def _run(self, buffers: StepBuffers, binding: Any, slot: int | None) -> None:
        if step_io.COMMIT not in self._inputs:
            self._move_committed(buffers, slot or 0)
        visible = visible_rows(buffers, self.layout.rows)
        if visible != binding.visible:
            self._show(binding, visible)
        if binding.cpu is not None:
            binding.cpu.fill(buffers)
        started = time.perf_counter()
        self._session.run_with_iobinding(binding.io, self._run_options)
        self.engine_seconds += time.perf_counter() - started

    def _show(self, binding: Bound, visible: int) -> None:
        """Bind what depends on the number of cache rows that a step may look at."""
        binding.visible = visible
        if binding.cpu is None:
            binding.io.bind_ortvalue_input(step_io.COLUMNS, self._columns_value(visible))
        else:
            binding.cpu.show(visible)
            binding.io.bind_ortvalue_input(step_io.MASK, self._value(binding.cpu.mask))

    def _move_committed(self, buffers: StepBuffers, first_slot: int) -> None:
        for index, (sources, end) in enumerate(zip(buffers.commit.tolist(), buffers.write_index.tolist(), strict=True)):
            targets = range(end - len(sources), end)
            moves = [(source, target) for source, target in zip(sources, targets, strict=True) if source != target]
            if moves:
                source, target = np.array(moves).T
                slot = self.caches[:, first_slot + index]
                slot[:, :, target] = slot[:, :, source]

    def _columns_value(self, visible: int) -> Any:
        if visible not in self._column_values:
            self._column_values[visible] = self._value(self._columns[:visible])
        return self._column_values[visible]

    def _bind(self, buffers: StepBuffers, wanted: Wanted, slot: int | None) -> Any:
        binding = self._session.io_binding()
        cpu = CpuInputs(buffers, self.layout) if step_io.MASK in self._inputs else None
        for name in step_io.CPU_INPUTS if cpu is not None else ():
            if name != step_io.MASK:
                binding.bind_ortvalue_input(name, self._value(getattr(cpu, name)))
        for name in self._small_inputs():
            binding.bind_ortvalue_input(name, self._value(getattr(buffers, name)))
        if step_io.HEADS_WANTED in self._inputs:
            binding.bind_ortvalue_input(step_io.HEADS_WANTED, self._answers[wanted.heads])
        if step_io.LOGITS_WANTED in self._inputs:
            binding.bind_ortvalue_input(step_io.LOGITS_WANTED, self._answers[wanted.logits])
        for name in small_outputs(wanted):
            binding.bind_ortvalue_output(name, self._value(getattr(buffers, name)))
        layers = self.layout.layers
        caches = self._cache_values if slot is None else [self._value(cache[slot : slot + 1]) for cache in self.caches]
        for past, present, value in zip(step_io.past_names(layers), step_io.present_names(layers), caches, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return Bound(binding, cpu)
