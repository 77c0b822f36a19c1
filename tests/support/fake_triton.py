"""A stand-in of ``triton_python_backend_utils`` as Triton documents it: what a decoupled model calls, and nothing else."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self._code = code

    def message(self) -> str:
        return str(self)

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


FINAL = 1


class Sender:
    """Collects responses. Nothing may be sent behind the final flag."""

    def __init__(self) -> None:
        self.sent: list[InferenceResponse] = []
        self.final, self.some, self.cancelled = threading.Event(), threading.Event(), False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response behind the final one"
        if response is not None:
            self.sent.append(response)
            self.some.set()
        if flags & FINAL:
            self.final.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceRequest:
    def __init__(self, **tensors: Any) -> None:
        self.tensors = {name: Tensor(name, np.array(values, np.object_)) for name, values in tensors.items()}
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


def module() -> ModuleType:
    """The module that a model imports."""
    made = ModuleType("triton_python_backend_utils")
    names: dict[str, Any] = {"Tensor": Tensor, "TritonError": TritonError, "InferenceResponse": InferenceResponse}
    names |= {"InferenceRequest": InferenceRequest, "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL}
    names["get_input_tensor_by_name"] = lambda request, name: request.tensors.get(name)
    made.__dict__.update(names)
    return made
