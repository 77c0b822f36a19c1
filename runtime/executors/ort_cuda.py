"""ONNX Runtime on an NVIDIA GPU: caches stay on the device, a step's small inputs and outputs cross the bus."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CapacityError, ProviderError
from . import step_io
from .executor import Abilities
from .ort_base import CPU_PROVIDER, OrtBase, OrtModel, fetched, import_onnxruntime
from .step_arrays import Recent, StepInputs, StepOutputs, visible_rows
from .step_plan import NanSlots, SlotResult, SlotRows, StepPlan, StepResult, Wanted, wanted_by_any

CUDA_PROVIDER = "CUDAExecutionProvider"
# Without TF32 an fp32 bundle is decoded in fp32; without growth by powers of two the arena takes what it needs.
CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


@dataclass(slots=True)
class _Bound:
    """Inputs and outputs of one kind of call over ``slots`` slots from ``first`` on, and their binding."""

    io: Any
    inputs: StepInputs
    outputs: StepOutputs
    first: int
    slots: int
    copied_bytes: int
    """What a call sends and fetches, but for the columns."""

    checked: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.inputs.nbytes + self.outputs.nbytes


class OrtDeviceExecutor(OrtBase):
    """Runs the standard step graph over caches that live on a device.

    A plan becomes one call for all decoding slots, padded to one number of rows, and one for each prefill chunk. The call covers
    the slots from the first to the last decoding one; those between that rest get padding behind the rows that they keep.

    Each cache is one device tensor [slots, H_kv, S, D_h], allocated once. It is bound by its address as the past input and as the
    present output of its layer; a call binds the part of its slots. Logits and hidden states leave the device only when a
    call wants them.

    ONNX Runtime copies a host input to the device when it is *bound*, not when the graph runs: an input that is bound once would
    keep its first value, so small inputs are bound again in every step. ``copied_bytes`` counts what calls have sent and fetched.
    """

    def __init__(self, model: OrtModel, device: str = "cuda", threads: int | None = None) -> None:
        """Load the engine and allocate the caches. ``device``: cuda, or cpu for the same calls without a GPU.

        Raises:
            MissingDependencyError: onnxruntime isn't installed.
            ProviderError: the device's provider isn't there, or another one answered.
        """
        ort = import_onnxruntime("gpu" if device == "cuda" else "cpu")
        self.device = device
        self._said = _prepare_cuda(ort) if device == "cuda" else ""
        provider = (CUDA_PROVIDER, CUDA_OPTIONS) if device == "cuda" else (CPU_PROVIDER, {})
        super().__init__(model, ort, provider, threads)
        layout = model.layout
        self._shape = (layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        # Zeros, not whatever the memory held: a hidden NaN would still reach the output through the softmax.
        self.caches = [self._device_zeros() for _ in range(2 * layout.layers)]
        self._columns = np.arange(layout.rows, dtype=np.int64)
        self._bound: Recent[_Bound] = Recent()
        self._with_nan = NanSlots()
        self._margin = model.num_heads
        self._sent = [name for name in step_io.STEP_INPUTS if name != step_io.COLUMNS and name in self._inputs]
        self.copied_bytes = 0
        self.abilities = Abilities(layout.slots, model.num_heads, padded=layout.slots > 1)

    def _device_zeros(self) -> Any:
        zeros = np.zeros(self._shape, self.layout.dtype)
        try:
            value = self._ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)
        except RuntimeError as error:
            raise ProviderError(
                f"no room for {2 * self.layout.layers} caches of {zeros.nbytes} bytes on {self.device}: {error}",
                hint="load fewer slots, or export with a smaller --capacity",
            ) from error
        return value

    def _options(self, path: Path) -> Any:
        options = super()._options(path)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def placement(self) -> dict[str, dict[str, int]]:
        """Count the step graph's nodes by provider and operator, as ONNX Runtime placed them.

        Raises:
            ProviderError: this version of ONNX Runtime doesn't say.
        """
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            version = self._ort.__version__
            raise ProviderError(f"onnxruntime {version} doesn't say where it placed nodes", hint="use a newer version")
        found: dict[str, dict[str, int]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            by_operator = found.setdefault(part.ep_name, {})
            for node in part.get_nodes():
                by_operator[node.op_type] = by_operator.get(node.op_type, 0) + 1
        return found

    def _open(self, path: Path) -> Any:
        try:
            return super()._open(path)
        except ProviderError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise ProviderError(
                f"{self._provider[0]} can't load {path.name}: {str(error)[:300]}", hint=self._fallback_hint()
            ) from error

    def _fallback_hint(self) -> str:
        said = f" ({self._said})" if self._said else ""
        return (
            f"check that nvidia-smi shows a GPU and a driver that is new enough, and that CUDA and cuDNN of the version that "
            f"onnxruntime-gpu wants can be loaded{said}"
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Run the plan: the decoding slots in one call, then each prefill chunk; see :class:`.executor.Executor`."""
        self._with_nan.clear_reused(plan, self._clear)
        found: dict[int, SlotResult | Exception] = {}
        decoding = [rows for rows in plan.active if not rows.prefills]
        moving = [slot for slot, moves in enumerate(plan.moves) if moves]
        if decoding or moving:
            slots = [*(rows.slot for rows in decoding), *moving]
            found |= self._batch(plan, decoding, min(slots), max(slots) + 1)
        for rows in plan.active:
            if rows.prefills:
                found |= self._batch(plan, [rows], rows.slot, rows.slot + 1)
        return self._with_nan.noted(plan, StepResult(tuple([found[rows.slot] for rows in plan.active])))

    def _clear(self, slot: int) -> None:
        """Fill a slot's caches with zeros. They pass through the host: ONNX Runtime writes whole tensors only."""
        for cache in self.caches:
            values = cache.numpy().copy()
            values[slot] = 0
            cache.update_inplace(values)

    def _batch(self, plan: StepPlan, active: list[SlotRows], first: int, end: int) -> dict[int, SlotResult | Exception]:
        """One call over the slots [first, end); results of ``active`` by slot."""
        count = max((rows.count for rows in active), default=1)
        wanted = wanted_by_any(active)
        prefills = any(rows.prefills for rows in active)
        try:
            key = (first, end, count, prefills, wanted)
            bound = self._bound.get(key, lambda: self._bind(first, end - first, count, 1 if prefills else count, wanted))
            by_slot = {rows.slot: rows for rows in active}
            for slot in range(first, end):
                # A chunk's call follows the one that moved rows; no slot has both.
                if slot in by_slot:
                    bound.inputs.fill(by_slot[slot], plan.lengths[slot], plan.moves[slot], slot - first)
                else:
                    bound.inputs.rest(plan.lengths[slot], plan.moves[slot], slot - first)
            seconds = self._call(bound)
            return {rows.slot: bound.outputs.result(rows.slot - first, rows, seconds) for rows in active}
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no base of their own; the loop names them
            return dict.fromkeys([rows.slot for rows in active], error)

    def _bind(self, first: int, slots: int, rows: int, logit_rows: int, wanted: Wanted) -> _Bound:
        binding, outputs = self._session.io_binding(), self._outputs(slots, logit_rows, wanted)
        results = {name: getattr(outputs, name) for name in fetched(wanted)}
        for name, array in results.items():
            binding.bind_ortvalue_output(name, self._value(array))
        dtype = np.dtype(self.layout.dtype).type
        shape, layers = (slots, *self._shape[1:]), self.layout.layers
        for past, present, cache in zip(step_io.past_names(layers), step_io.present_names(layers), self.caches, strict=True):
            address = cache.data_ptr() + self._offset(first)
            binding.bind_input(past, self.device, 0, dtype, shape, address)
            binding.bind_output(present, self.device, 0, dtype, shape, address)
        inputs = StepInputs.allocate(slots, rows, logit_rows, self._margin)
        copied = [*results.values(), *(getattr(inputs, name) for name in self._sent)]
        return _Bound(binding, inputs, outputs, first, slots, sum(array.nbytes for array in copied))

    def _call(self, bound: _Bound) -> float:
        """Run the graph; the results are in ``bound.outputs`` afterwards. Returns the seconds that it took."""
        inputs = bound.inputs
        self._check_rows(inputs)
        # Padding of resting slots is written, but never read: T follows the active ones.
        ends = inputs.write_index[inputs.forced > 0]
        visible = visible_rows(int(ends.max(initial=self._margin)) + inputs.rows, self.layout.rows)
        started = time.perf_counter()
        for name in self._sent:
            bound.io.bind_ortvalue_input(name, self._value(getattr(inputs, name)))
        columns = self._columns[:visible]
        bound.io.bind_ortvalue_input(step_io.COLUMNS, self._value(columns))
        bound.io.synchronize_inputs()
        self._session.run_with_iobinding(bound.io, self._run_options)
        bound.io.synchronize_outputs()
        seconds = time.perf_counter() - started
        self.engine_seconds += seconds
        self.copied_bytes += bound.copied_bytes + columns.nbytes
        if not bound.checked:
            self._check_in_place(bound)
        return seconds

    def _check_in_place(self, bound: _Bound) -> None:
        """A run must leave every present output at its cache's address."""
        outputs = bound.io.get_outputs()[-len(self.caches) :]
        addresses = [cache.data_ptr() + self._offset(bound.first) for cache in self.caches]
        assert [value.data_ptr() for value in outputs] == addresses, "the caches were copied, not updated in place"
        bound.checked = True

    def _offset(self, slot: int) -> int:
        """Bytes from the beginning of a cache to a slot's part of it."""
        return slot * int(np.prod(self._shape[1:])) * np.dtype(self.layout.dtype).itemsize

    def _check_rows(self, inputs: StepInputs) -> None:
        """CUDA's scatter clamps rows past the end, which would overwrite valid ones in silence."""
        margin, rows, commit = inputs.margin, self.layout.rows, inputs.commit
        first, end = int(inputs.write_index.min()) - margin, int(inputs.write_index.max()) + inputs.rows
        if first < 0 or end > rows or commit.min() < 0 or commit.max() >= rows:
            raise CapacityError(
                f"a step writes cache rows {first} to {end - 1} and moves rows {commit.min()} to {commit.max()}; "
                f"a cache has rows 0 to {rows - 1}",
                hint="shorten the sequence or export with a larger --capacity",
            )


def _prepare_cuda(ort: Any) -> str:
    """Load the CUDA libraries that came as Python packages; what that said, when something is missing.

    Raises:
        ProviderError: this onnxruntime has no CUDA provider at all.
    """
    available = ort.get_available_providers()
    if CUDA_PROVIDER not in available:
        raise ProviderError(
            f"this onnxruntime ({ort.__version__}) has no {CUDA_PROVIDER}, only {', '.join(available)}",
            hint="uninstall onnxruntime and install onnxruntime-gpu: pip install 'medusa-deploy[gpu]'",
        )
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said):  # it prints what it can't find
            ort.preload_dlls()
    missing = [line.partition(":")[0].strip() for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    return "; ".join(missing)
