"""Finds the matrix products of a graph whose weights are constant: what they multiply with, and which layer they belong to.

Every pass, quantiser and engine of this folder finds them here, on onnx_ir graphs. Calibration has a finder of its own, on ONNX
protos (:mod:`medusa_deploy.calibration.int8.matmuls`): export and calibration don't import each other, what both import is the
runtime, and that knows neither onnx nor onnx_ir.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...runtime.executors import step_io
from .patterns import producer_if

MATMULS = ("MatMul", "Gemm")
_MULTIPLY = ("MatMul", "MatMulNBits", "MatMulIntegerToFloat")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
NUMBERS_AT_A_TIME = 1 << 19
_CACHE = re.compile(step_io.past_names(1)[0].replace("0", r"(\d+)"))


@dataclass(frozen=True, slots=True)
class Matrix:
    """The constant matrix that a node multiplies with.

    ``parts``: initializers that stand side by side along its outputs, most often one. ``transposed``: stored [outputs, inputs].
    ``turn``: the Transpose between them and the node, or None.
    """

    parts: tuple[ir.Value, ...]
    transposed: bool
    turn: ir.Node | None


def constant_matrix(node: ir.Node) -> Matrix | None:
    """Find the float matrix that a MatMul or Gemm multiplies with, perhaps through a Transpose or a Concat of several."""
    if node.op_type not in MATMULS or node.domain:
        return None
    value, flag = node.inputs[1], node.attributes.get("transB")
    transposed = flag is not None and bool(flag.as_int())
    turn = producer_if(value, "Transpose")
    if turn is not None:
        value, transposed = turn.inputs[0], not transposed
    concat = producer_if(value, "Concat")
    if concat is not None and concat.attributes["axis"].as_int() != (0 if transposed else 1):
        return None
    parts = (value,) if concat is None else tuple(concat.inputs)
    found = tuple(part for part in parts if part is not None and _is_matrix(part))
    return Matrix(found, transposed, turn) if len(found) == len(parts) else None


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) == 2


@dataclass(slots=True, eq=False)
class CpuMatmul:
    """A MatMul of the CPU graph with a constant matrix W [N, K] of N outputs.

    ``weights``: initializers that make up W, side by side along its outputs. ``transposed``: stored [N, K]. ``multipliers`` [K]
    of its inputs and ``divisors`` [N] of its outputs are to be taken into W. ``layer``: the backbone's layer, None for the
    vocabulary projection and the heads.
    """

    node: ir.Node
    weights: tuple[ir.Value, ...]
    transposed: bool
    layer: int | None
    is_projection: bool
    multipliers: np.ndarray = field(default_factory=lambda: np.ones(1, np.float32))
    divisors: np.ndarray = field(default_factory=lambda: np.ones(1, np.float32))

    @property
    def name(self) -> str:
        """Its name in reports: with its layer, since nodes are only numbered."""
        return str(self.node.name) if self.layer is None else f"layers.{self.layer}/{self.node.name}"

    @property
    def of_heads(self) -> bool:
        """True if only the heads' results need it."""
        return self.layer is None and not self.is_projection

    @property
    def widths(self) -> list[int]:
        """Outputs of each of the weights."""
        return [int(_shape(weight)[0 if self.transposed else 1]) for weight in self.weights]

    @property
    def shape(self) -> tuple[int, int]:
        """Its sizes N and K."""
        return sum(self.widths), int(_shape(self.weights[0])[1 if self.transposed else 0])

    @property
    def places(self) -> set[object]:
        """Where its weights are stored: matmuls may share them under different names."""
        return {place_of(weight.const_value) for weight in self.weights}

    @property
    def activation(self) -> ir.Value:
        """The value [.., K] that it reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    def matrix(self) -> np.ndarray:
        """Return W as float32 [N, K], multipliers and divisors taken in."""
        matrix, at = np.empty(self.shape, np.float32), 0
        for piece in self.pieces():
            matrix[at : at + len(piece)] = piece
            at += len(piece)
        return matrix

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield the rows of :meth:`matrix` in order, a few at a time: the whole is only where its tensors are.

        A file that a tensor lies in is unmapped behind it: pages that were read count as this process's memory.
        """
        outputs, size = self.shape
        divisors = np.broadcast_to(self.divisors, (outputs,))[:, None]
        step, at = max(1, NUMBERS_AT_A_TIME // size), 0
        for weight, width in zip(self.weights, self.widths, strict=True):
            tensor = weight.const_value
            assert tensor is not None
            stored = tensor.numpy()
            for first in range(0, width, step):
                rows = stored[first : first + step] if self.transposed else stored[:, first : first + step].T
                yield np.ascontiguousarray(rows, np.float32) * self.multipliers / divisors[at : at + len(rows)]
                at += len(rows)
                del rows
            del stored
            if isinstance(tensor, ir.ExternalTensor):
                with contextlib.suppress(BufferError):  # somebody else reads it, too
                    tensor.release()


def place_of(tensor: ir.TensorProtocol | None) -> object:
    """Return where a tensor is stored: the file and the offset, or what stands for the tensor itself."""
    return (str(tensor.path), tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else id(tensor)


def find_matmuls(model: ir.Model) -> list[CpuMatmul]:
    """List all MatMuls of the graph and of its branches with constant matrices of at least two rows and columns."""
    found: list[CpuMatmul] = []
    last: int | None = None  # layer of the last attention so far
    projection = _projection(model.graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        last = last if (layer := attention_layer(node)) is None else layer
        matrix = constant_matrix(node) if node.op_type == "MatMul" else None
        if matrix is not None and all(map(_is_large, matrix.parts)):
            is_projection = node is projection
            layer = layer_of(node, last) if node.graph is model.graph and not is_projection else None
            found.append(CpuMatmul(node, matrix.parts, matrix.transposed, layer, is_projection))
    return found


def _projection(graph: ir.Graph) -> ir.Node | None:
    """Return the node that makes the logits, before they are scaled and capped."""
    value: ir.Value | None = next((value for value in graph.outputs if value.name == step_io.LOGITS), None)
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Mul", "Div", "Tanh", "Cast"):
        value = next((value for value in node.inputs if value is not None and value.const_value is None), None)
        node = None if value is None else value.producer()
    return node


def plain_step_bytes(model: ir.Model) -> int:
    """Count the bytes of the matrices that a CPU graph multiplies with in every step: branches are taken now and then."""
    matrices: dict[str, int] = {}
    waiting = [node.inputs[index] for node in model.graph if node.op_type in _MULTIPLY for index in range(1, len(node.inputs))]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is not None and node.op_type in ("Transpose", "Concat"):
            waiting += node.inputs
        elif value is not None and value.is_initializer() and value.const_value is not None:
            matrices[str(value.name)] = value.const_value.nbytes
    return sum(matrices.values())


def layer_of(matmul: ir.Node, last: int | None) -> int | None:
    """Find a matmul's layer: queries, keys and values belong to the attention that reads them, others to the last one before."""
    seen, waiting = {matmul}, [matmul]
    while waiting:
        for user in waiting.pop().successors():
            layer = attention_layer(user)
            if layer is not None:
                return layer
            if user not in seen and user.op_type != "MatMul":
                seen.add(user)
                waiting.append(user)
    return last


def attention_layer(node: ir.Node) -> int | None:
    """Find the layer of an attention, fused or not, and of a write into a cache."""
    if node.op_type == "Attention":  # reads slices of the caches that were written
        slices = [producer_if(value, "Slice") for value in node.inputs]
        writes = [producer_if(each.inputs[0], "TensorScatter") for each in slices if each is not None]
        return next((layer for each in writes if each is not None and (layer := attention_layer(each)) is not None), None)
    for value in node.inputs if node.op_type in ("GroupQueryAttention", "TensorScatter") else ():
        named = _CACHE.fullmatch(str(value.name)) if value is not None else None
        if named:
            return int(named[1])
    return None


def _is_large(value: ir.Value) -> bool:
    """True if a matrix is float32, as the kernels for few bits take it, and more than a vector."""
    assert value.const_value is not None
    return value.const_value.dtype == ir.DataType.FLOAT and min(_shape(value)) > 1


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())
