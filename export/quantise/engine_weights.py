"""Puts weights into few bits for engines: integer or fp8 tensors with explicit DequantizeLinear nodes, all standard operators.

A large weight W of a MatMul or Gemm becomes ``DequantizeLinear(q, scale)``; :mod:`.engine_formats` says which q and scale.
Activations keep their type, so nothing has to be calibrated. :mod:`.activations` puts activations into few bits, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..passes.matmuls import constant_matrix
from ..weights import WeightsFile, read_graph
from .engine_formats import LARGEST, NEAREST, Rounding, Stored, channel_scales, quantised, release, stored_as

__all__ = ["LARGEST", "channel_scales", "quantised", "release"]

_SMALLEST_WEIGHT = 1 << 14  # elements; in a smaller weight scales and one more operator cost more than the bytes saved


@dataclass(frozen=True, slots=True)
class QuantisationReport:
    """Counts the ``weights`` in few bits, those of each format, and their bytes before and after (scales included)."""

    weights: int
    bytes_before: int
    bytes_after: int
    formats: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Weight:
    """Names the constant matrix ``value`` of a matmul and its axis of outputs.

    Input ``index`` of ``user`` reads the matrix. The user is the matmul or a Transpose before it.
    """

    value: ir.Value
    user: ir.Node
    index: int
    axis: int


def quantise_weights(
    model: ir.Model,
    skipped: Collection[str] = (),
    precisions: Mapping[str, str] | None = None,
    rounding: Rounding = NEAREST,
    smoothed: Mapping[str, tuple[str, np.ndarray | None]] | None = None,
) -> QuantisationReport:
    """Rewrite the large MatMul and Gemm weights of ``model``, in place; values are computed when they are saved, one by one.

    ``skipped``: names of the matmuls that keep theirs. ``precisions``: formats of the others by name, int8 where none is given.
    ``smoothed``: by the name of a matmul, the name that its weight was exported with and the factors that its activation was
    divided by.
    """
    graph = model.graph
    made: dict[tuple[str, int, str], tuple[Stored, ir.Value, ir.Value]] = {}
    for node in list(graph):
        found = weight_of(node)
        if found is None or node.name in skipped or not holds_few_bits(node):
            continue
        weight, user, index, axis = found.value, found.user, found.index, found.axis
        assert weight.name is not None and weight.const_value is not None
        precision = (precisions or {}).get(str(node.name), "int8")
        key = (weight.name, axis, precision)
        if key not in made:
            exported, factors = (smoothed or {}).get(str(node.name), (weight.name, None))
            stored = stored_as(precision, weight.const_value, axis, rounding, exported, factors)
            made[key] = (stored, *_values(graph, weight.name, stored))
        stored, *values = made[key]
        # Every user gets a DequantizeLinear of its own, as builders expect it.
        dequantise = ir.node("DequantizeLinear", values, stored.attributes, name=f"{user.name}/dequantise.{index}")
        dequantise.outputs[0].name = f"{user.name}/dequantised.{index}"
        dequantise.outputs[0].type, dequantise.outputs[0].shape = weight.type, weight.shape
        graph.insert_before(user, [dequantise])
        user.replace_input_with(index, dequantise.outputs[0])
    for name in {name for name, _axis, _precision in made}:
        if not graph.initializers[name].uses():
            graph.initializers.pop(name)
    all_stored = [stored for stored, *_values in made.values()]
    before, after = (sum(sizes) for sizes in ([each.tensor.nbytes for each in all_stored], [each.nbytes for each in all_stored]))
    return QuantisationReport(len(made), before, after, Counter(type(each).__name__.lower() for each in all_stored))


def write_quantised(
    source: Path,
    output: Path,
    weights: WeightsFile,
    quantise: Callable[[ir.Model], QuantisationReport] = quantise_weights,
    *,
    turned: bool = False,
) -> QuantisationReport:
    """Read a graph, quantise it, and write it to ``output`` with all its big tensors in ``weights``.

    ``turned``: matrices that stand ``[out, in]`` behind a Transpose are stored ``[in, out]`` without one.

    Raises:
        QuantisationError: a weight holds NaN or infinity.
        OSError: the file system refused.
    """
    model = read_graph(source)
    _turn_apart(model.graph)
    if turned:
        _turn_matrices(model.graph)
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


def _turn_matrices(graph: ir.Graph) -> None:
    """Put turned matrices where matrices behind a Transpose are. A matrix that is read in other ways, too, stays beside it."""
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        found = weight_of(node)
        if found is None or found.user is node:
            continue
        value, turn = found.value, found.user
        tensor = value.const_value
        assert value.name is not None and tensor is not None
        if value.name not in made:
            shape = ir.Shape(list(reversed(tensor.shape.numpy())))
            other = ir.Value(name=f"{value.name}/turned", type=value.type, shape=shape)
            other.const_value = lazy(other, partial(_turned, tensor), tensor.dtype, shape)
            graph.register_initializer(other)
            made[value.name] = other
        node.replace_input_with(1, made[value.name])
        if not turn.outputs[0].uses():
            graph.remove(turn, safe=True)
    for name in made:
        if not graph.initializers[name].uses() and not graph.initializers[name].is_graph_output():
            graph.initializers.pop(name)


def _turned(tensor: ir.TensorProtocol) -> np.ndarray:
    turned = np.ascontiguousarray(tensor.numpy().T)
    release(tensor)
    return turned


def holds_few_bits(node: ir.Node) -> bool:
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


def _values(graph: ir.Graph, name: str, stored: Stored) -> tuple[ir.Value, ir.Value]:
    """Add codes and scales to the graph, under the weight's name."""
    kind, tensor = type(stored).__name__.lower(), stored.tensor
    shape, scale_shape = (ir.Shape(list(sizes)) for sizes in (stored.shape, stored.scale_shape))
    codes = ir.Value(name=f"{name}/{kind}.{stored.axis}", type=ir.TensorType(stored.dtype), shape=shape)
    scales = ir.Value(name=f"{name}/{kind}.scale.{stored.axis}", type=ir.TensorType(tensor.dtype), shape=scale_shape)
    codes.const_value = lazy(codes, stored.codes, stored.dtype, shape)
    scales.const_value = lazy(scales, stored.scales, tensor.dtype, scale_shape)
    for value in (codes, scales):
        graph.register_initializer(value)
    return codes, scales


def lazy(value: ir.Value, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: ir.ShapeProtocol) -> ir.LazyTensor:
    """Return a tensor for ``value`` whose data ``make`` computes whenever it is read."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor(make(), name=value.name)

    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape.numpy()), name=value.name)


def _copied(tensor: ir.ExternalTensor) -> np.ndarray:
    copy = tensor.numpy().copy()
    release(tensor)
    return copy
