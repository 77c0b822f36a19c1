"""Stores the weights of all graphs of a bundle in one file, equal tensors once, as ONNX external data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

from ..runtime.errors import BundleIntegrityError

# External data is memory-mapped at load, so offsets lie on page boundaries (the largest common page, on ARM, has 64 KiB).
ALIGNMENT = 65536
_SMALLEST_EXTERNAL = 1024


class BundleTensor(ir.ExternalTensor):
    """A tensor in a file of the bundle, whose files may have several hard links.

    A copy made with ``cp -al`` has such files, and so has a bundle of linked weights. onnx_ir refuses them.
    """

    def _check_path_containment(self) -> None:
        folder = Path(self.base_dir).resolve()
        if not Path(self.path).resolve().is_relative_to(folder):
            raise BundleIntegrityError(f"a graph reads weights from {self.location!r}", hint="don't use this bundle")


def read_graph(path: Path) -> ir.Model:
    """Read a graph of a bundle. Its weights stay in their files until they are asked for; then the file must lie beside it."""
    model = ir.load(path)
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            shape = ir.Shape(tensor.shape.numpy())
            place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
            value.const_value = BundleTensor(*place, shape=shape, name=tensor.name or "", base_dir=tensor.base_dir)
    return model


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
        self.keep(model, path.parent)
        ir.save(model, path)

    def keep(self, model: ir.Model, folder: Path, *, others: bool = False) -> None:
        """Move the big initializers of ``model``, whose graph will lie in ``folder``, to the weights file.

        ``others``: also those that lie in other files, whatever their size.
        """
        location = self.path.relative_to(folder).as_posix()
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            elsewhere = tensor if isinstance(tensor, ir.ExternalTensor) else None
            if elsewhere is not None and (not others or Path(elsewhere.path) == self.path):
                continue
            if elsewhere is None and tensor.nbytes < _SMALLEST_EXTERNAL:
                continue
            place = (location, self._store(tensor), tensor.nbytes, tensor.dtype)
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(*place, shape=shape, name=value.name or "", base_dir=folder)
            if elsewhere is not None:
                elsewhere.release()

    def _store(self, tensor: ir.TensorProtocol) -> int:
        data = np.ascontiguousarray(tensor.numpy())
        # Numbers that numpy lacks have no buffer, and two of 4 bits share a byte.
        raw = data.data if data.ndim and data.dtype.kind in "biuf" else ir.tensor(data, dtype=tensor.dtype).tobytes()
        key = (hashlib.sha256(raw).hexdigest(), str(tensor.dtype), tuple(data.shape))
        if key not in self._offsets:
            padding = -self._end % ALIGNMENT
            self._file.write(b"\0" * padding)
            self._file.write(raw)
            self._offsets[key] = self._end + padding
            self._end += padding + memoryview(raw).nbytes
        return self._offsets[key]
