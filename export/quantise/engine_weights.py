"""Puts weights into 8 bits for engines: int8 tensors with explicit DequantizeLinear nodes, of standard operators only.

A large weight W of a MatMul or Gemm becomes ``DequantizeLinear(q, scale)``. Each output channel has a symmetric scale of W's
type. Activations keep their type, so nothing has to be calibrated. :mod:`.w8a8` puts activations into 8 bits, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...runtime.errors import QuantisationError
from ..passes.matmuls import constant_matrix
from ..weights import WeightsFile, read_graph

LARGEST = 127
_SMALLEST_WEIGHT = 1 << 14  # elements; in a smaller weight scales and one more operator cost more than the bytes saved
_BLOCK = 1 << 22  # elements that are worked on at a time
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True, slots=True)
class QuantisationReport:
    """Counts the ``weights`` that are int8 now, and their bytes before and after (scales included)."""

    weights: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Weight:
    """Names the constant matrix ``value`` of a matmul and its axis of outputs.

    Input ``index`` of ``user`` reads the matrix. The user is the matmul or a Transpose before it.
    """

    value: ir.Value
    user: ir.Node
    index: int
    axis: int


def channel_scales(weight: np.ndarray, axis: int) -> np.ndarray:
    """Compute the scales [channels] of a matrix whose output channels lie along ``axis``: a channel's largest magnitude / 127.

    Scales have the matrix's type. A channel of zeros gets scale 1: its values stay exactly zero. Scales are rounded up to fp16,
    so that nothing is clipped.

    Raises:
        QuantisationError: a channel holds NaN or infinity; the message has its index.
    """
    largest = np.concatenate([np.abs(block).max(1 - axis).astype(np.float32) for block in _blocks(weight, axis)])
    broken = np.flatnonzero(~np.isfinite(largest))
    if broken.size:
        raise QuantisationError(
            f"channel {broken[0]} holds NaN or infinity, as do {broken.size - 1} others",
            hint="the checkpoint's weights are broken",
        )
    exact = largest / LARGEST
    scales = np.maximum(exact, _SMALLEST_SCALE).astype(weight.dtype)
    scales = np.where(scales.astype(np.float32) < exact, np.nextafter(scales, weight.dtype.type(np.inf)), scales)
    return np.where(largest == 0, weight.dtype.type(1), scales)


def quantised(weight: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """Round a weight to int8, in its shape: each value in whole steps of its channel's scale, −127 to 127."""
    result = np.empty(weight.shape, np.int8)
    start = 0
    for block in _blocks(weight, axis):
        size = block.shape[axis]
        inside = (slice(None),) * axis + (slice(start, start + size),)
        steps = scales[start : start + size].astype(np.float32)
        # A float32 scale isn't rounded up: the largest value may come to lie a hair above 127 steps.
        result[inside] = np.clip(np.rint(block.astype(np.float32) / (steps if axis else steps[:, None])), -LARGEST, LARGEST)
        start += size
    return result


def quantise_weights(model: ir.Model, skipped: Collection[str] = ()) -> QuantisationReport:
    """Rewrite the large MatMul and Gemm weights of ``model``, in place; values are computed when they are saved, one by one.

    ``skipped``: names of the matmuls that keep theirs.
    """
    graph = model.graph
    made: dict[tuple[str, int], tuple[ir.Value, ir.Value]] = {}
    before = after = 0
    for node in list(graph):
        found = weight_of(node)
        if found is None or node.name in skipped or not holds_8_bits(node):
            continue
        weight, user, index, axis = found.value, found.user, found.index, found.axis
        assert weight.name is not None and weight.const_value is not None
        key = (weight.name, axis)
        if key not in made:
            made[key] = _stored(graph, weight, axis)
            before += weight.const_value.nbytes
            after += sum(value.const_value.nbytes for value in made[key] if value.const_value is not None)
        # Every user gets a DequantizeLinear of its own, as builders expect it.
        dequantise = ir.node("DequantizeLinear", made[key], {"axis": axis}, name=f"{user.name}/dequantise.{index}")
        dequantise.outputs[0].name = f"{user.name}/dequantised.{index}"
        dequantise.outputs[0].type, dequantise.outputs[0].shape = weight.type, weight.shape
        graph.insert_before(user, [dequantise])
        user.replace_input_with(index, dequantise.outputs[0])
    for name in {name for name, _axis in made}:
        if not graph.initializers[name].uses():
            graph.initializers.pop(name)
    return QuantisationReport(len(made), before, after)


def write_quantised(
    source: Path,
    output: Path,
    weights: WeightsFile,
    quantise: Callable[[ir.Model], QuantisationReport] = quantise_weights,
) -> QuantisationReport:
    """Read a graph, quantise it, and write it to ``output`` with all its big tensors in ``weights``.

    Raises:
        QuantisationError: a weight holds NaN or infinity.
        OSError: the file system refused.
    """
    model = read_graph(source)
    _turn_apart(model.graph)
    report = quantise(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = lazy(value, partial(_copied, tensor), tensor.dtype, tensor.shape)
    weights.save(model, output)
    return report


def _turn_apart(graph: ir.Graph) -> None:
    """Give every product a Transpose of its own where several share one: heads may share the projection's."""
    for turn in list(graph):
        if turn.op_type == "Transpose" and turn.inputs[0] is not None and turn.inputs[0].is_initializer():
            for number, use in enumerate(list(turn.outputs[0].uses())[1:], 1):
                own = ir.node("Transpose", [turn.inputs[0]], turn.attributes, name=f"{turn.name}/{number}")
                own.outputs[0].name = f"{turn.outputs[0].name}/{number}"
                own.outputs[0].type, own.outputs[0].shape = turn.outputs[0].type, turn.outputs[0].shape
                graph.insert_after(turn, [own])
                use.node.replace_input_with(use.idx, own.outputs[0])


def holds_8_bits(node: ir.Node) -> bool:
    """True if :func:`quantise_weights` rewrites the weight of this matmul."""
    found = weight_of(node)
    return found is not None and found.value.const_value is not None and found.value.const_value.size >= _SMALLEST_WEIGHT


def weight_of(node: ir.Node) -> Weight | None:
    """Find the weight of a MatMul or Gemm: a constant matrix that stands in the node's graph, whole."""
    matrix = constant_matrix(node)
    if matrix is None or len(matrix.parts) != 1:
        return None
    (value,) = matrix.parts
    turn = matrix.turn
    if node.graph is None or value.name not in node.graph.initializers or (turn is not None and len(turn.outputs[0].uses()) > 1):
        return None
    axis = 0 if matrix.transposed else 1
    return Weight(value, node, 1, axis) if turn is None else Weight(value, turn, 0, axis)


def _stored(graph: ir.Graph, weight: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    tensor = weight.const_value
    assert tensor is not None
    channels = ir.Shape([int(tensor.shape[axis])])  # type: ignore[arg-type]
    steps = ir.Value(name=f"{weight.name}/int8.{axis}", type=ir.TensorType(ir.DataType.INT8), shape=weight.shape)
    scales = ir.Value(name=f"{weight.name}/scale.{axis}", type=ir.TensorType(tensor.dtype), shape=channels)
    steps.const_value = lazy(steps, partial(_quantised_tensor, tensor, axis), ir.DataType.INT8, tensor.shape)
    scales.const_value = lazy(scales, partial(_scales_of, tensor, axis), tensor.dtype, channels)
    for value in (steps, scales):
        graph.register_initializer(value)
    return steps, scales


def lazy(value: ir.Value, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: ir.ShapeProtocol) -> ir.LazyTensor:
    """Return a tensor for ``value`` whose data ``make`` computes whenever it is read."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(make(), name=value.name)

    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape.numpy()), name=value.name)


def _scales_of(tensor: ir.TensorProtocol, axis: int) -> np.ndarray:
    try:
        scales = channel_scales(tensor.numpy(), axis)
    except QuantisationError as error:
        raise QuantisationError(f"the weight {tensor.name}: {error.message}", hint=error.hint) from None
    release(tensor)
    return scales


def _quantised_tensor(tensor: ir.TensorProtocol, axis: int) -> np.ndarray:
    scales = _scales_of(tensor, axis)
    steps = quantised(tensor.numpy(), scales, axis)
    release(tensor)
    return steps


def _copied(tensor: ir.ExternalTensor) -> np.ndarray:
    copy = tensor.numpy().copy()
    release(tensor)
    return copy


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap the file that a tensor lies in: pages that were read count as this process's memory."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def _blocks(weight: np.ndarray, axis: int) -> list[np.ndarray]:
    """Cut a weight between channels into views of at most ``_BLOCK`` elements."""
    channels = weight.shape[axis]
    pieces = max(1, -(-weight.size // _BLOCK))
    size = -(-channels // pieces)
    return [weight[(slice(None),) * axis + (slice(start, start + size),)] for start in range(0, channels, size)]
