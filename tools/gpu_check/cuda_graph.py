"""Tries whether ONNX Runtime captures the step as a CUDA graph, and what a replayed step takes.

The executor ``cuda`` captures nothing: it binds small inputs on the host. Here they lie on the device, at fixed addresses.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.executors import step_io
from ...runtime.executors.ort_base import ort_path
from ...runtime.executors.ort_cuda import CUDA_OPTIONS, CUDA_PROVIDER
from ...runtime.executors.step_arrays import StepInputs, StepOutputs, visible_rows
from ...runtime.executors.step_plan import StepPlan, Wanted

if TYPE_CHECKING:
    from ...runtime.executors.ort_base import OrtModel

_HEADS = Wanted(heads=True)
_FETCHED = (step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS)


class CapturedSteps:
    """A session whose steps of one slot are captured, on a GPU; on a CPU the same calls without a capture.

    Raises whatever ONNX Runtime raises where it can't capture the graph.
    """

    def __init__(self, model: OrtModel, device: str) -> None:
        import onnxruntime as ort

        self._ort, self._model, self._device = ort, model, device
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider: Any = "CPUExecutionProvider"
        if device == "cuda":
            provider = (CUDA_PROVIDER, CUDA_OPTIONS | {"enable_cuda_graph": "1"})
        self._session = ort.InferenceSession(ort_path(model.step), options, providers=[provider], enable_fallback=0)
        self._inputs = {value.name for value in self._session.get_inputs()}
        layout = model.layout
        zeros = np.zeros((1, layout.kv_heads, layout.rows, layout.head_dim), layout.dtype)
        self._caches = [self._value(zeros) for _ in range(2 * layout.layers)]

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def milliseconds(self, plan: StepPlan, repeats: int) -> float:
        """Time the plan's step of one slot: the median of ``repeats`` replays, without copies."""
        (rows,) = plan.active
        model, layout = self._model, self._model.layout
        inputs = StepInputs.allocate(1, rows.count, rows.count, model.num_heads)
        inputs.fill(rows, plan.lengths[0], plan.moves[0])
        sizes = (model.num_heads, model.top_k, model.hidden_size, model.vocab_size)
        outputs = StepOutputs.allocate(1, rows.count, *sizes, layout.dtype, _HEADS)
        visible = visible_rows(int(inputs.write_index[0]) + rows.count, layout.rows)
        binding = self._session.io_binding()
        kept = []  # bindings hold addresses alone
        for name in step_io.STEP_INPUTS:
            array = np.arange(visible) if name == step_io.COLUMNS else getattr(inputs, name)
            if name in self._inputs:
                kept.append(self._value(array))
                binding.bind_ortvalue_input(name, kept[-1])
        for name in _FETCHED:
            kept.append(self._value(getattr(outputs, name)))
            binding.bind_ortvalue_output(name, kept[-1])
        for past, present, cache in zip(
            step_io.past_names(layout.layers), step_io.present_names(layout.layers), self._caches, strict=True
        ):
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(present, cache)
        run_options = self._ort.RunOptions()
        run_options.add_run_config_entry("gpu_graph_id", str(rows.count))
        taken = []
        for turn in range(2 + repeats):
            started = time.perf_counter()
            self._session.run_with_iobinding(binding, run_options)
            if turn > 1:  # the first captures, the second warms up
                taken.append(1e3 * (time.perf_counter() - started))
        return median(taken)
