"""Finds the matmuls of a step graph with a constant weight, cuts the graph into pieces, and scales the weights.

Works on ONNX protos, which ONNX Runtime loads as they are. Export finds matmuls on onnx_ir graphs: it rewrites them
(:mod:`medusa_deploy.export.passes.matmuls`), and neither package imports the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...runtime.errors import BundleIntegrityError, QuantisationError, RangeError
from ...runtime.executors import step_io
from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import LEVELS, SMALLEST_SCALE

_BLOCK = 1 << 22  # elements that are worked on at a time
_MATMULS = ("MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Matmul:
    """A MatMul or Gemm with a constant matrix.

    ``activation`` [..., C]: the tensor that it reads. ``axis``: of the weight's output channels. ``channels``: C. ``of_heads``:
    only the heads' outputs need it.
    """

    name: str
    activation: str
    weight: str
    axis: int
    channels: int
    of_heads: bool


def read_graph(bundle: Bundle, file: str) -> Any:
    """Read the ONNX model in a file of the bundle, without weights that lie in other files.

    Raises:
        BundleIntegrityError: it is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(bundle.path(file), load_external_data=False)
    except DecodeError as error:
        raise BundleIntegrityError(f"{file} is no ONNX graph: {error}", hint="export the bundle again") from None


class StepGraph:
    """One of a bundle's step graphs, without its weights."""

    def __init__(self, bundle: Bundle, variant: str = "standard") -> None:
        """Read the graph.

        Raises:
            BundleIntegrityError: it is no ONNX file.
        """
        self._bundle = bundle
        self._file = bundle.manifest.graph(variant)
        self._model = read_graph(bundle, self._file)
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._producers = {output: node for node in self._model.graph.node for output in node.output}
        self.outputs = {output.name for output in self._model.graph.output}
        self.matmuls = self._find_matmuls()

    @property
    def nodes(self) -> Sequence[Any]:
        """The graph's nodes, each behind the nodes that it reads from."""
        nodes: Sequence[Any] = self._model.graph.node
        return nodes

    @property
    def value_shape(self) -> tuple[int, int]:
        """Heads of keys and values, and channels of each."""
        backbone = self._bundle.manifest.backbone
        return backbone.kv_heads, backbone.head_dim

    @property
    def folder(self) -> Path:
        """The folder of the weights' files."""
        return self._bundle.path(self._file).parent

    def with_outputs(self, names: Iterable[str]) -> bytes:
        """Serialise the graph with these tensors as further outputs. Its weights stay where they were."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        known = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        return bytes(model.SerializeToString())

    def needed_nodes(self, outputs: Iterable[str], given: Iterable[str] = ()) -> list[Any]:
        """List the nodes that these tensors come from, in the graph's order. A tensor that is ``given`` needs none."""
        known, open_values, found = set(given), list(outputs), set()
        while open_values:
            name = open_values.pop()
            node = None if name in known else self._producers.get(name)
            if node is not None and node.output[0] not in found:
                found.add(node.output[0])
                open_values.extend(_read_by(node))
        return [node for node in self._model.graph.node if node.output[0] in found]

    def piece(self, given: str | None, outputs: Sequence[str]) -> bytes:
        """Serialise the nodes that ``outputs`` come from, with the weights and the graph's inputs that they read.

        ``given``: a hidden state [B, N, H] that is an input of the piece instead of being computed.
        """
        import onnx

        nodes = self.needed_nodes(outputs, () if given is None else (given,))
        read = set().union(*map(_read_by, nodes))
        model = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = "piece"
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(tensor for name, tensor in self._weights.items() if name in read)
        model.graph.input.extend(value for value in self._model.graph.input if value.name in read)
        if given is not None:
            element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype_of(given)))
            model.graph.input.append(onnx.helper.make_tensor_value_info(given, element, ["B", "N", None]))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return bytes(model.SerializeToString())

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Return a tensor's type in the graph; the model's own if the graph doesn't say it."""
        from onnx import helper

        known = (value.type.tensor_type.elem_type for value in self._model.graph.value_info if value.name == name)
        element = next(known, 0)
        return helper.tensor_dtype_to_np_dtype(element) if element else np.dtype(self._bundle.manifest.dtype)

    def producer(self, name: str) -> Any:
        """Return the node that makes a tensor; None for inputs and weights."""
        return self._producers.get(name)

    @cached_property
    def readers(self) -> Mapping[str, Sequence[str]]:
        """Names of the nodes that read each tensor. A node reads what graphs inside it read."""
        found: dict[str, list[str]] = {}
        for node in self._model.graph.node:
            for name in _read_by(node):
                found.setdefault(name, []).append(node.name)
        return found

    def is_vector(self, name: str, size: int) -> bool:
        """True if a tensor is a constant [size]."""
        return name in self._weights and list(self._weights[name].dims) == [size]

    def weights_bytes(self) -> int:
        """Count the bytes of all weights of rank 2 and more in float32: ONNX Runtime converts them to that on a CPU."""
        sizes: Iterator[int] = (math.prod(tensor.dims) for tensor in self._weights.values() if len(tensor.dims) > 1)
        return 4 * sum(sizes)

    def weight_scales(self, name: str, axis: int) -> np.ndarray:
        """Compute scales float32 of a weight's output channels: largest magnitude / 127. A channel of zeros has scale 1.

        Raises:
            QuantisationError: NaN or infinity.
            RangeError: all zero, or a channel too small for a step to be a normal float32.
        """
        largest = np.concatenate([np.abs(block).max(0).astype(np.float32) for block in self.weight_blocks(name, axis)])
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

    def weight_blocks(self, name: str, axis: int) -> Iterator[np.ndarray]:
        """Yield the weight [C, outputs] in views of some outputs each, of at most about ``_BLOCK`` elements."""
        weight = self._values(name)
        weight = weight if axis else weight.T
        size = max(1, _BLOCK // max(weight.shape[0], 1))
        return (weight[:, start : start + size] for start in range(0, weight.shape[1], size))

    def _find_matmuls(self) -> list[Matmul]:
        of_backbone = {node.name for node in self.needed_nodes((step_io.LAST_ROW, step_io.NEXT_TOKEN))}
        found = []
        for node in self._model.graph.node:
            weight, transposed = self.weight_of(node)
            if weight is not None:
                axis = 0 if transposed else 1
                channels = int(weight.dims[1 - axis])
                found.append(Matmul(node.name, node.input[0], weight.name, axis, channels, node.name not in of_backbone))
        return found

    def weight_of(self, node: Any) -> tuple[Any, bool]:
        """Find the constant matrix that a node multiplies with, perhaps through a Transpose. The flag is true for [out, in]."""
        import onnx

        if node.op_type not in _MATMULS or node.domain:
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

    def _values(self, name: str) -> np.ndarray:
        """Read the matrix. One that lies in a file of its own is mapped."""
        import onnx
        from onnx import helper, numpy_helper

        tensor = self._weights[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        path = self._bundle.path((PurePosixPath(self._file).parent / place["location"]).as_posix())
        dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        return np.memmap(path, dtype, "r", int(place.get("offset", 0)), shape)


def _read_by(node: Any) -> set[str]:
    """Collect the names of the tensors that a node reads, in the graphs inside it, too."""
    inner = (each for attribute in node.attribute if attribute.HasField("g") for each in attribute.g.node)
    return {*node.input}.union(*map(_read_by, inner))
