"""ONNX Runtime on an NVIDIA GPU: caches stay on the device, a step's small inputs and outputs cross the bus."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CapacityError, ProviderError
from . import step_io
from .executor import StepBuffers, Wanted, visible_rows
from .ort_base import CPU_PROVIDER, OrtBase, OrtModel, import_onnxruntime, small_outputs

CUDA_PROVIDER = "CUDAExecutionProvider"
# Without TF32 an fp32 bundle is decoded in fp32; without growth by powers of two the arena takes what it needs.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


class OrtDeviceExecutor(OrtBase):
    """Runs the standard step graph over caches that live on a device.

    Each cache is one device tensor [slots, H_kv, S, D_h], allocated once. It is bound by its address as the past input and as the
    present output of its layer; a prefill binds the part of one slot. Logits and hidden states leave the device only when a
    call wants them.

    ONNX Runtime copies a host input to the device when it is *bound*, not when the graph runs: an input that is bound once would
    keep its first value, so small inputs are bound again in every step.
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
        provider = (CUDA_PROVIDER, _CUDA_OPTIONS) if device == "cuda" else (CPU_PROVIDER, {})
        super().__init__(model, ort, provider, threads)
        layout = model.layout
        self._shape = (layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        # Zeros, not whatever the memory held: a hidden NaN would still reach the output through the softmax.
        self.caches = [self._device_zeros() for _ in range(2 * layout.layers)]
        self._columns = np.arange(layout.rows, dtype=np.int64)
        self._checked: set[int] = set()  # step bindings, which are kept for good

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

    def _bind(self, buffers: StepBuffers, wanted: Wanted, slot: int | None) -> Any:
        binding = self._session.io_binding()
        for name in small_outputs(wanted):
            binding.bind_ortvalue_output(name, self._value(getattr(buffers, name)))
        dtype = np.dtype(self.layout.dtype).type
        shape = self._shape if slot is None else (1, *self._shape[1:])
        layers = self.layout.layers
        for past, present, cache in zip(step_io.past_names(layers), step_io.present_names(layers), self.caches, strict=True):
            address = cache.data_ptr() + self._offset(slot)
            binding.bind_input(past, self.device, 0, dtype, shape, address)
            binding.bind_output(present, self.device, 0, dtype, shape, address)
        return binding

    def _run(self, buffers: StepBuffers, binding: Any, slot: int | None) -> None:
        self._check_rows(buffers)
        visible = visible_rows(buffers, self.layout.rows)
        started = time.perf_counter()
        for name in self._small_inputs():
            binding.bind_ortvalue_input(name, self._value(getattr(buffers, name)))
        binding.bind_ortvalue_input(step_io.COLUMNS, self._value(self._columns[:visible]))
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, self._run_options)
        binding.synchronize_outputs()
        self.engine_seconds += time.perf_counter() - started
        if slot is not None or id(binding) not in self._checked:
            self._check_in_place(binding, slot)

    def _check_in_place(self, binding: Any, slot: int | None) -> None:
        """A run must leave every present output at its cache's address."""
        outputs = binding.get_outputs()[-len(self.caches) :]
        addresses = [cache.data_ptr() + self._offset(slot) for cache in self.caches]
        assert [value.data_ptr() for value in outputs] == addresses, "the caches were copied, not updated in place"
        if slot is None:
            self._checked.add(id(binding))

    def _offset(self, slot: int | None) -> int:
        """Bytes from the beginning of a cache to a slot's part of it."""
        return (slot or 0) * int(np.prod(self._shape[1:])) * np.dtype(self.layout.dtype).itemsize

    def _check_rows(self, buffers: StepBuffers) -> None:
        """CUDA's scatter clamps rows past the end, which would overwrite valid ones in silence."""
        margin, rows = buffers.margin, self.layout.rows
        first, end = int(buffers.write_index.min()) - margin, int(buffers.write_index.max()) + buffers.rows
        if first < 0 or end > rows or buffers.commit.min() < 0 or buffers.commit.max() >= rows:
            raise CapacityError(
                f"a step writes cache rows {first} to {end - 1} and moves rows {buffers.commit.min()} to {buffers.commit.max()}; "
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
