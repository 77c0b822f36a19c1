"""ONNX Runtime on the CPU: one call for all slots that can share it, over caches that are bound once and updated in place."""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files.cache import FOLDER_VARIABLE
from . import step_io
from .cpu_inputs import CpuInputs
from .executor import Abilities
from .huge_pages import huge_pages
from .ort_base import CPU_PROVIDER, OrtBase, OrtModel, fetched, import_onnxruntime, ort_path, session_options
from .packed import SPARE_ROWS, PackedStep
from .packed_weights import shared_graphs
from .step_arrays import Recent, StepInputs, StepOutputs, visible_rows
from .step_plan import NanSlots, SlotResult, SlotRows, StepPlan, StepResult, Wanted, wanted_by_any

__all__ = ["Bound", "OrtExecutor", "OrtModel"]

_LOG = logging.getLogger("medusa_deploy")

DEEPEST = 16
"""Drafted tokens that a step can accept where the host moves accepted rows: any number would do; lookup drafts up to 16."""

_PROMPT_ROWS = 128
"""Of a prompt, in a step of several slots. A prompt of 1,500 tokens took 4 % longer than with 256, and its neighbours waited half
as long."""


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
    """Runs a step graph with ONNX Runtime's CPU provider.

    One active slot runs the graph itself. Several run a packed graph, the smallest one that has places for them (:mod:`.packed`).
    Where a model has none, slots run one after another: a step of the standard graph over four slots costs more than four steps
    over one. A step pays for its active slots alone, and a slot's fp32 tokens are the same bit for bit whoever else decodes.

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
        ort, layout = import_onnxruntime("cpu"), model.layout
        self._twins: dict[Path, Path] = {}
        if layout.slots > 1 and (shared := _twins(model, ort)) is not None:
            self._twins = shared[0]
            weakref.finalize(self, os.close, shared[1])
        with huge_pages():
            super().__init__(model, ort, (CPU_PROVIDER, {}), threads)
            self._packed_sessions = {places: self._open(path) for places, path in model.packed.items() if path in self._twins}
        shape = (2 * layout.layers, layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        self.caches = np.zeros(shape, layout.dtype)
        self._cache_values = [[self._value(cache[slot : slot + 1]) for cache in self.caches] for slot in range(layout.slots)]
        self._graph_moves = step_io.COMMIT in self._inputs
        self._windows = step_io.mask_windows(sorted(self._inputs))  # only CPU graphs read masks
        deepest = model.num_heads if self._graph_moves else max(DEEPEST, model.num_heads)
        prompt_rows = _PROMPT_ROWS if layout.slots > 1 else None
        self.abilities = Abilities(
            layout.slots, deepest, packed=bool(self._packed_sessions), copies=True, prompt_rows=prompt_rows
        )
        self._margin = model.num_heads
        self._bound: Recent[Bound] = Recent()
        self._packed: Recent[PackedStep] = Recent()
        self._packed_caches = self._cache_values
        if self._packed_sessions:
            spare = np.zeros((2 * layout.layers, 1, layout.kv_heads, SPARE_ROWS, layout.head_dim), layout.dtype)
            self._packed_caches = [*self._cache_values, [self._value(cache) for cache in spare]]
        self._with_nan = NanSlots()
        self._columns = np.arange(layout.rows, dtype=np.int64)
        self._truth = np.array([False, True])
        self._answers = [self._value(self._truth[answer : answer + 1].reshape(())) for answer in range(2)]

    def run(self, plan: StepPlan) -> StepResult:
        """Run the plan, active slots together where they can share a call; see :class:`.executor.Executor`."""
        self._with_nan.clear_reused(plan, self._clear)
        active = plan.active
        in_graph = {rows.slot for rows in active} if self._graph_moves else ()
        for slot, moves in enumerate(plan.moves):
            if moves and slot not in in_graph:
                self._move(slot, plan.lengths[slot], moves)
        if self._are_neighbours(active):
            found = self._shared(plan, active, partial(self._call_over, plan, active))
        else:
            found, most = [], max(self._packed_sessions, default=1)
            for index, start in enumerate(range(0, len(active), most)):
                group = active[start : start + most]
                found += self._shared(plan, group, partial(self._packed_call, plan, group, index))
        return self._with_nan.noted(plan, StepResult(tuple(found)))

    def _are_neighbours(self, active: tuple[SlotRows, ...]) -> bool:
        """Whether the slots lie side by side and have one row each: then the attention takes all of them in one call."""
        slots = sorted(rows.slot for rows in active)
        if len(slots) < 2 or not self._packed_sessions:
            return False
        return slots[-1] - slots[0] < len(slots) and all(rows.count == 1 for rows in active)

    def _shared(
        self, plan: StepPlan, active: tuple[SlotRows, ...], call: Callable[[], list[SlotResult]]
    ) -> list[SlotResult | Exception]:
        """Run some of the plan's slots by ``call``; one by one if there is one, or if the call that they share fails."""
        if len(active) > 1:
            try:
                return [*call()]
            except AssertionError:
                raise
            except Exception as error:  # noqa: BLE001 - one by one, those that fail fail alone
                _LOG.warning("a step of %d slots failed; each runs alone: %s", len(active), error)
        return [self._alone(plan, rows) for rows in active]

    def _packed_call(self, plan: StepPlan, active: tuple[SlotRows, ...], index: int) -> list[SlotResult]:
        """Run a packed graph. ``index``: of the call in its step; each has buffers of its own."""
        places = min(places for places in self._packed_sessions if places >= len(active))
        session, wanted = self._packed_sessions[places], wanted_by_any(active)
        step = self._packed.get(
            (places, wanted, index), lambda: PackedStep(session, self._value, self.model, places, wanted, self._packed_caches)
        )
        step.fill(active, plan.lengths)
        return step.results(active, self._timed(lambda: session.run_with_iobinding(step.binding, self._run_options)))

    def _timed(self, call: Callable[[], object]) -> float:
        """Call the engine. Returns the seconds that it took."""
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
        self.engine_seconds += seconds
        return seconds

    def copy(self, source: int, target: int, rows: int) -> None:
        """Copy the first rows of a slot to another; see :class:`.executor.CopyingExecutor`."""
        if target in self._with_nan:
            self._clear(target)
            self._with_nan.remove(target)
        end = self._margin + rows
        self.caches[:, target, :, self._margin : end] = self.caches[:, source, :, self._margin : end]

    def _clear(self, slot: int) -> None:
        self.caches[:, slot] = 0

    def _alone(self, plan: StepPlan, rows: SlotRows) -> SlotResult | Exception:
        try:
            (result,) = self._call_over(plan, (rows,))
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no base of their own; the loop names them
            return error
        return result

    def _call_over(self, plan: StepPlan, active: tuple[SlotRows, ...]) -> list[SlotResult]:
        """Run the graph for one slot over the rows of one, or over one row of each of several neighbours."""
        first, slots = min(active, key=lambda rows: rows.slot), len(active)
        wanted = first.wanted if slots == 1 else wanted_by_any(active)
        key = (first.slot, slots, first.count, first.prefills, wanted)
        bound = self._bound.get(key, lambda: self._bind(first, slots, wanted))
        end = max([plan.lengths[rows.slot] for rows in active]) + first.count
        visible = visible_rows(self._margin + end, self.layout.rows)
        if visible != bound.visible:
            self._show(bound, visible)
        for rows in active:
            bound.inputs.fill(rows, plan.lengths[rows.slot], plan.moves[rows.slot], rows.slot - first.slot)
        seconds = self._timed(lambda: self._call(bound, first, plan.lengths[first.slot]))
        return [bound.outputs.result(rows.slot - first.slot, rows, seconds) for rows in active]

    def _graph(self, path: Path, options: Any) -> str | bytes:
        twin = self._twins.get(path)
        if twin is not None:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was optimised before
        return super()._graph(twin or path, options)

    def _call(self, bound: Bound, rows: SlotRows, length: int) -> None:  # noqa: ARG002 - observers say what they saw
        """Run the graph. ``rows``: of the first slot, behind ``length`` kept ones."""
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

    def _bind(self, rows: SlotRows, slots: int, wanted: Wanted) -> Bound:
        count = rows.count
        logit_rows = 1 if rows.prefills else count
        inputs: CpuInputs | StepInputs
        if self._windows:
            inputs = CpuInputs(count, logit_rows, self._margin, self.layout.dtype, self._windows, slots)
        else:
            inputs = StepInputs.allocate(slots, count, logit_rows, self._margin)
        outputs, binding = self._outputs(slots, logit_rows, wanted), self._session.io_binding()
        for name in (*step_io.STEP_INPUTS, *step_io.CPU_INPUTS):
            if name in self._inputs and name != step_io.COLUMNS:
                binding.bind_ortvalue_input(name, self._value(getattr(inputs, name)))
        for name, answer in ((step_io.HEADS_WANTED, wanted.heads), (step_io.LOGITS_WANTED, wanted.logits)):
            if name in self._inputs:
                binding.bind_ortvalue_input(name, self._answers[answer])
        for name in fetched(wanted):
            binding.bind_ortvalue_output(name, self._value(getattr(outputs, name)))
        layers, caches = self.layout.layers, self._cache_values[rows.slot]
        if slots > 1:
            caches = [self._value(cache[rows.slot : rows.slot + slots]) for cache in self.caches]
        for past, present, value in zip(step_io.past_names(layers), step_io.present_names(layers), caches, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return Bound(binding, inputs, outputs)


def _twins(model: OrtModel, ort: Any) -> tuple[dict[Path, Path], int] | None:
    """Return the graphs of ``model``, those for several slots among them, as twins that share one file of packed weights.

    The second value is a descriptor that keeps them in the cache. Without room for such a file there is nothing to return: slots
    then run one after another, because packing in memory would take the memory of all weights once for each graph.
    """

    def save(source: Path, target: Path, entries: Mapping[str, str]) -> None:
        options = session_options(ort, source)
        options.optimized_model_filepath = ort_path(target)
        for key, entry in entries.items():
            options.add_session_config_entry(key, entry)
        ort.InferenceSession(ort_path(source), options, providers=[CPU_PROVIDER], enable_fallback=0)

    enough = [places for places in sorted(model.packed) if places >= model.layout.slots][:1]
    graphs = {1: model.step, **{places: path for places, path in model.packed.items() if not enough or places <= enough[0]}}
    if len(graphs) == 1:
        return None
    try:
        shared, handle = shared_graphs(graphs, model.identity, ort.__version__, save)
    except OSError as error:
        warnings.warn(
            f"slots will run one after another: the cache of packed weights can't be written ({error.strerror or error}); "
            f"name a folder with room for it in {FOLDER_VARIABLE}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return {graphs[number]: twin for number, twin in shared.items()}, handle
