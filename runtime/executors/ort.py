"""ONNX Runtime on the CPU: one call a slot, over caches that are bound once and updated in place."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import step_io
from .cpu_inputs import CpuInputs
from .executor import Abilities
from .ort_base import CPU_PROVIDER, OrtBase, OrtModel, fetched, import_onnxruntime
from .step_arrays import Recent, StepInputs, StepOutputs, visible_rows
from .step_plan import SlotResult, SlotRows, StepPlan, StepResult

__all__ = ["Bound", "OrtExecutor", "OrtModel"]

DEEPEST = 16
"""Drafted tokens that a step can accept where the host moves accepted rows: any number would do; lookup drafts up to 16."""


@dataclass(slots=True)
class Bound:
    """Inputs and outputs of one kind of call, their binding, and how many cache rows it shows."""

    io: Any
    inputs: CpuInputs | StepInputs
    outputs: StepOutputs
    visible: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.inputs.nbytes + self.outputs.nbytes


class OrtExecutor(OrtBase):
    """Runs a step graph with ONNX Runtime's CPU provider, slot after slot: a step pays for its active slots alone.

    A slot's tokens are therefore the same bit for bit whoever else decodes. One step of the standard graph over four slots costs
    more than four steps over one.

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
        self._cache_values = [[self._value(cache[slot : slot + 1]) for cache in self.caches] for slot in range(layout.slots)]
        self._graph_moves = step_io.COMMIT in self._inputs
        self._windows = step_io.mask_windows(sorted(self._inputs))  # only CPU graphs read masks
        deepest = model.num_heads if self._graph_moves else max(DEEPEST, model.num_heads)
        self.abilities = Abilities(layout.slots, deepest, copies=True)
        self._margin = model.num_heads
        self._bound: Recent[Bound] = Recent()
        self._with_nan: set[int] = set()  # slots whose cache may hold NaN
        self._columns = np.arange(layout.rows, dtype=np.int64)
        self._truth = np.array([False, True])
        self._answers = [self._value(self._truth[answer : answer + 1].reshape(())) for answer in range(2)]

    def run(self, plan: StepPlan) -> StepResult:
        """Run the plan, one call for each active slot; see :class:`.executor.Executor`."""
        for slot in [rows.slot for rows in plan.active if rows.slot in self._with_nan and not plan.lengths[rows.slot]]:
            self.caches[:, slot] = 0  # masks hide stale rows by weights of 0, and 0 · NaN is NaN
            self._with_nan.remove(slot)
        in_graph = {rows.slot for rows in plan.active} if self._graph_moves else ()
        for slot, moves in enumerate(plan.moves):
            if moves and slot not in in_graph:
                self._move(slot, plan.lengths[slot], moves)
        return StepResult(tuple([self._slot(rows, plan.lengths[rows.slot], plan.moves[rows.slot]) for rows in plan.active]))

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of a slot to another; see :class:`.executor.CopyingExecutor`."""
        if target in self._with_nan:
            self.caches[:, target] = 0
            self._with_nan.remove(target)
        end = self._margin + rows
        self.caches[:, target, :, self._margin : end] = self.caches[:, source, :, self._margin : end]

    def _slot(self, rows: SlotRows, length: int, moves: tuple[int, ...]) -> SlotResult | Exception:
        try:
            bound = self._bound.get((rows.slot, rows.count, rows.prefills, rows.wanted), lambda: self._bind(rows))
            visible = visible_rows(self._margin + length + rows.count, self.layout.rows)
            if visible != bound.visible:
                self._show(bound, visible)
            bound.inputs.fill(rows, length, moves)
            started = time.perf_counter()
            self._call(bound, rows, length)
            seconds = time.perf_counter() - started
            self.engine_seconds += seconds
            result = bound.outputs.result(0, rows, seconds)
            if not result.finite:
                self._with_nan.add(rows.slot)
            return result
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no base of their own; the loop names them
            return error

    def _call(self, bound: Bound, rows: SlotRows, length: int) -> None:  # noqa: ARG002 - observers say what they saw
        """Run the graph over one slot's rows behind ``length`` kept ones."""
        self._session.run_with_iobinding(bound.io, self._run_options)

    def _show(self, bound: Bound, visible: int) -> None:
        """Bind what depends on the number of cache rows that a call may look at."""
        bound.visible = visible
        if isinstance(bound.inputs, CpuInputs):
            bound.inputs.show(visible)
            for name, mask in bound.inputs.masks.items():
                bound.io.bind_ortvalue_input(name, self._value(mask))
        else:
            bound.io.bind_ortvalue_input(step_io.COLUMNS, self._value(self._columns[:visible]))

    def _move(self, slot: int, length: int, moves: tuple[int, ...]) -> None:
        """Copy accepted rows to the end of the ``length`` kept ones, all at once: sources and targets may overlap."""
        cache, end = self.caches[:, slot], self._margin + length
        cache[:, :, end - len(moves) : end] = cache[:, :, [self._margin + row for row in moves]]

    def _bind(self, rows: SlotRows) -> Bound:
        count, wanted = rows.count, rows.wanted
        logit_rows = 1 if rows.prefills else count
        inputs: CpuInputs | StepInputs
        if self._windows:
            inputs = CpuInputs(count, logit_rows, self._margin, self.layout.dtype, self._windows)
        else:
            inputs = StepInputs.allocate(1, count, logit_rows, self._margin)
        outputs, binding = self._outputs(1, logit_rows, wanted), self._session.io_binding()
        for name in (*step_io.STEP_INPUTS, *step_io.CPU_INPUTS):
            if name in self._inputs and name != step_io.COLUMNS:
                binding.bind_ortvalue_input(name, self._value(getattr(inputs, name)))
        for name, answer in ((step_io.HEADS_WANTED, wanted.heads), (step_io.LOGITS_WANTED, wanted.logits)):
            if name in self._inputs:
                binding.bind_ortvalue_input(name, self._answers[answer])
        for name in fetched(wanted):
            binding.bind_ortvalue_output(name, self._value(getattr(outputs, name)))
        layers, caches = self.layout.layers, self._cache_values[rows.slot]
        for past, present, value in zip(step_io.past_names(layers), step_io.present_names(layers), caches, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return Bound(binding, inputs, outputs)
