"""An onnxruntime whose GPU is host memory: real sessions behind it, the rules of a device in front.

- A host input is copied when it is bound: what is written to it later isn't seen.
- What lies on the device is reached by address only.
- The CUDA provider is there, or it falls back in silence, as the real one does.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class DeviceValue:
    """A tensor on the device."""

    def __init__(self, array: np.ndarray, device: str) -> None:
        self.array, self.device, self.read = array, device, 0

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def numpy(self) -> np.ndarray:
        """A copy, where the tensor lies on the device; ``read`` counts them."""
        self.read += self.device != "cpu"
        return self.array if self.device == "cpu" else self.array.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        self.array[...] = array


class Binding:
    """A real binding to the CPU, filled by the device's rules; ``sent`` counts host inputs that were copied."""

    def __init__(self, ort: Any, session: Any) -> None:
        self._ort, self.real = ort, session.io_binding()
        self._kept: dict[str, Any] = {}
        self.sent: list[str] = []
        self.synchronized = False

    def bind_ortvalue_input(self, name: str, value: DeviceValue) -> None:
        assert value.device == "cpu"
        copy = self._ort.OrtValue.ortvalue_from_numpy(value.array.copy())
        self._kept[name] = copy
        self.sent.append(name)
        self.synchronized = False
        self.real.bind_ortvalue_input(name, copy)

    def bind_ortvalue_output(self, name: str, value: DeviceValue) -> None:
        assert value.device == "cpu"
        self._kept[name] = self._ort.OrtValue.ortvalue_from_numpy(value.array)
        self.real.bind_ortvalue_output(name, self._kept[name])

    def bind_input(self, name: str, device: str, _id: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert device == "cuda"
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name: str, device: str, _id: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert device == "cuda"
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)

    def synchronize_inputs(self) -> None:
        self.synchronized = True

    def synchronize_outputs(self) -> None:
        pass

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


class Session:
    """A real CPU session that says it is ``provider``'s."""

    def __init__(self, fake: FakeOrt, path: str, options: Any, providers: list[tuple[str, dict[str, str]]], **_: Any) -> None:
        fake.asked.append(providers)
        if fake.failure is not None:
            raise fake.failure
        self._fake, self._real = fake, fake.real.InferenceSession(path, options, providers=[CPU])

    def get_providers(self) -> list[str]:
        return [CPU] if self._fake.falls_back else [CUDA, CPU]

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def io_binding(self) -> Binding:
        binding = Binding(self._fake.real, self._real)
        self._fake.bindings.append(binding)
        return binding

    def run(self, *arguments: Any) -> Any:
        return self._real.run(*arguments)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        assert binding.synchronized, "the inputs' copies may still be under way"
        self._real.run_with_iobinding(binding.real, options)


class FakeOrt(SimpleNamespace):
    """Stands in for the module."""

    def __init__(self, real: Any, *, falls_back: bool = False, available: tuple[str, ...] = (CUDA, CPU), said: str = "") -> None:
        super().__init__(real=real, falls_back=falls_back, failure=None, full=False)
        self.asked: list[Any] = []
        self.bindings: list[Binding] = []
        self.__version__ = "1.31.1"
        self.SessionOptions, self.RunOptions = real.SessionOptions, real.RunOptions
        self.get_available_providers = lambda: list(available)
        self.preload_dlls = lambda: sys.stdout.write(said)
        self.InferenceSession = lambda *arguments, **options: Session(self, *arguments, **options)
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def _value(self, array: np.ndarray, device: str = "cpu", _id: int = 0) -> DeviceValue:
        if device == "cuda" and self.full:
            raise RuntimeError("CUDA failure 2: out of memory")
        return DeviceValue(array if device == "cpu" else array.copy(), device)
