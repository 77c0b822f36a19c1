"""The products of a step graph that int8 is about: those with a constant weight. What they read, and scales of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..runtime import step_io
from ..runtime.bundle import Bundle
from ..runtime.errors import BundleIntegrityError, QuantisationError, RangeError
from ..runtime.scales_file import LEVELS, SMALLEST_SCALE

_BLOCK = 1 << 22  # elements that are worked on at a time
_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul or Gemm with a constant matrix.

    ``activation`` [..., C]: the tensor that it reads. ``axis``: of the weight's output channels; ``channels``: C. ``of_heads``:
    only the heads' outputs need it.
    """

    name: str
    activation: str
    weight: str
    axis: int
    channels: int
    of_heads: bool


class StepGraph:
    """A bundle's standard step graph, without its weights."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the graph.

        Raises:
            BundleIntegrityError: it is no ONNX file.
        """
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        self._bundle = bundle
        self._file = bundle.manifest.variants["standard"]
        try:
            self._model = onnx.load(bundle.path(self._file), load_external_data=False)
        except DecodeError as error:
            raise BundleIntegrityError(f"{self._file} is no ONNX graph: {error}", hint="export the bundle again") from None
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._producers = {output: node for node in self._model.graph.node for output in node.output}
        self.products = self._find_products()

    @property
    def folder(self) -> Path:
        """Where the weights' files lie."""
        return self._bundle.path(self._file).parent

    def with_outputs(self, names: Iterable[str]) -> bytes:
        """The graph with these tensors as further outputs, serialised; its weights are where they were."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        return bytes(model.SerializeToString())

    def weight_scales(self, name: str, axis: int) -> np.ndarray:
        """Scales float32 of a weight's output channels: the largest magnitude in 127 steps. A channel of zeros has scale 1.

        Raises:
            QuantisationError: NaN or infinity.
            RangeError: all zero, or a channel too small for a step to be a normal float32.
        """
        largest = np.concatenate([np.abs(block).max(1 - axis).astype(np.float32) for block in _blocks(self._values(name), axis)])
        if not np.isfinite(largest).all():
            channel = int(np.flatnonzero(~np.isfinite(largest))[0])
            raise QuantisationError(
                f"the weight {name} holds NaN or infinity in channel {channel}", hint="the checkpoint's weights are broken"
            )
        scales = largest / np.float32(LEVELS)
        small = np.flatnonzero((scales < SMALLEST_SCALE) & (largest > 0))
        if small.size or not largest.any():
            where = f"reaches no more than {largest[small[0]]:.3g} in channel {small[0]}" if small.size else "is zero"
            raise RangeError(f"the weight {name} {where}", hint="the checkpoint's weights are broken")
        return np.where(largest == 0, np.float32(1), scales)

    def _find_products(self) -> list[Product]:
        of_backbone = self._needed_by((step_io.LAST_ROW, step_io.NEXT_TOKEN))
        found = []
        for node in self._model.graph.node:
            weight, transposed = self._weight_of(node)
            if weight is not None:
                axis = 0 if transposed else 1
                channels = int(weight.dims[1 - axis])
                found.append(Product(node.name, node.input[0], weight.name, axis, channels, node.name not in of_backbone))
        return found

    def _weight_of(self, node: Any) -> tuple[Any, bool]:
        """The constant matrix that a node multiplies with, perhaps through a Transpose, and whether it stands [out, in]."""
        import onnx

        if node.op_type not in _PRODUCTS or node.domain:
            return None, False
        name = node.input[1]
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        producer = self._producers.get(name)
        if producer is not None and producer.op_type == "Transpose":
            name, transposed = producer.input[0], not transposed
        tensor = self._weights.get(name)
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in floats:
            return None, False
        return tensor, transposed

    def _needed_by(self, outputs: Iterable[str]) -> set[str]:
        """Names of the nodes that these outputs come from."""
        open_values, nodes = list(outputs), set()
        while open_values:
            node = self._producers.get(open_values.pop())
            if node is not None and node.name not in nodes:
                nodes.add(node.name)
                open_values.extend(node.input)
        return nodes

    def _values(self, name: str) -> np.ndarray:
        """The matrix, mapped where it lies in a file of its own."""
        import onnx
        from onnx import helper, numpy_helper

        tensor = self._weights[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        path = self._bundle.path((PurePosixPath(self._file).parent / place["location"]).as_posix())
        dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        return np.memmap(path, dtype, "r", int(place.get("offset", 0)), shape)


def _blocks(weight: np.ndarray, axis: int) -> Iterator[np.ndarray]:
    """Views of at most about ``_BLOCK`` elements, cut between output channels."""
    channels = weight.shape[axis]
    size = max(1, _BLOCK * channels // max(weight.size, 1))
    for start in range(0, channels, size):
        yield weight[(slice(None),) * axis + (slice(start, start + size),)]
