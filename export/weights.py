"""Stores the weights of all graphs of a bundle in one file, equal tensors once, as ONNX external data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

# External data is memory-mapped at load, so offsets lie on page boundaries (the largest common page, on ARM, has 64 KiB).
ALIGNMENT = 65536
_SMALLEST_EXTERNAL = 1024


class WeightsFile:
    """Collects the big initializers of several graphs into one file. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[tuple[str, str, tuple[int, ...]], int] = {}
        self._end = 0

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def save(self, model: ir.Model, path: Path) -> None:
        """Write ``model`` to ``path`` and its big initializers to the weights file, which lies in that folder or below it."""
        location = self.path.relative_to(path.parent).as_posix()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _SMALLEST_EXTERNAL and not isinstance(tensor, ir.ExternalTensor):
                offset = self._store(tensor)
                value.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=path.parent,
                )
        ir.save(model, path)

    def _store(self, tensor: ir.TensorProtocol) -> int:
        data = np.ascontiguousarray(tensor.numpy())
        digest = hashlib.sha256(data.data if data.ndim else data.tobytes()).hexdigest()
        key = (digest, str(tensor.dtype), tuple(data.shape))
        if key not in self._offsets:
            padding = -self._end % ALIGNMENT
            self._file.write(b"\0" * padding)
            self._file.write(data.data if data.ndim else data.tobytes())
            self._offsets[key] = self._end + padding
            self._end += padding + data.nbytes
        return self._offsets[key]
