"""SmoothQuant's migration on the standard and the device graph: factors go into norms' weights, products and their readers.

What :mod:`.smooth_cpu` does on the CPU's graph, whose operators are others, and one place more: what attention makes is a mean of
values, so the product of values takes factors of attention's output product, and caches hold values that are divided by them.
Weights are computed when they are saved, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from ...runtime.errors import QuantisationError
from ...runtime.files.scales_file import Scales
from ..passes.patterns import producer_if
from .engine_weights import Weight, lazy, release, weight_of

GRID = "tensor"
_FROM_VALUES = {"Slice": 0, "TensorScatter": 1, "GatherElements": 0, "Transpose": 0}
"""What stands between a step's values and attention: by operator, the input that their rows come in by."""


class _Change:
    """What a product's weight is multiplied with by input, and divided by by output."""

    def __init__(self) -> None:
        self.multipliers: np.ndarray | None = None
        self.divisors: np.ndarray | None = None


def fold_smoothing(graph: ir.Graph, scales: Scales, activations: Iterable[str]) -> set[str]:
    """Divide these activations by their factors, in place; returns those for which that was done.

    Those that no factors suit, or whose factors nothing before can take, stay as they are.
    """
    products = {node.outputs[0]: node for node in graph if weight_of(node) is not None}
    by_name = {value.name: value for node in products.values() if (value := node.inputs[0]) is not None}
    changes: dict[ir.Node, _Change] = {}
    done = set()
    for name in activations:
        found, value = scales.smoothing.get(name, {}).get(GRID), by_name.get(name)
        if found is None or found.alpha is None or value is None:
            continue
        readers = [use.node for use in value.uses()]
        foreign = [each for each in readers if each.outputs[0] not in products or each.inputs[0] is not value]
        if foreign or value.is_graph_output():
            continue
        factors = found.factors
        if (
            _into_norm(graph, value, factors)
            or _into_up(graph, value, factors, products, changes)
            or _into_values(graph, value, factors, products, changes)
        ):
            for reader in readers:
                changes.setdefault(reader, _Change()).multipliers = factors
            done.add(name)
    for node, change in changes.items():
        _rewrite(graph, node, change)
    return done


def _into_norm(graph: ir.Graph, value: ir.Value, factors: np.ndarray) -> bool:
    """Let the constant vector that ``value`` is a multiple of take 1/factors."""
    scaled = producer_if(value, "Mul")
    for index, vector in enumerate(() if scaled is None else scaled.inputs):
        if scaled is not None and _is_vector(vector, len(factors)):
            _divide(graph, scaled, index, factors)
            return True
    return False


def _into_up(
    graph: ir.Graph, value: ir.Value, factors: np.ndarray, products: Mapping[ir.Value, ir.Node], changes: dict[ir.Node, _Change]
) -> bool:
    """Let the product that ``value`` is a multiple of take 1/factors."""
    gated = producer_if(value, "Mul")
    return gated is not None and any(_into_outputs(graph, each, factors, products, changes) for each in gated.inputs)


def _into_values(
    graph: ir.Graph, value: ir.Value, factors: np.ndarray, products: Mapping[ir.Value, ir.Node], changes: dict[ir.Node, _Change]
) -> bool:
    """Let the product of the values that attention makes ``value`` of take 1/factors: one for all queries that share a head."""
    attention = attention_of(value)
    heads = None if attention is None else _values_of(attention.inputs[2])
    sizes = () if heads is None or heads.shape is None else heads.shape[-2:]
    if heads is None or not all(isinstance(size, int) for size in sizes):
        return False
    shared = factors.reshape(sizes[0], -1, sizes[1]) if len(factors) % int(np.prod(sizes)) == 0 else None  # type: ignore[arg-type]
    if shared is None or (shared != shared[:, :1]).any():
        return False
    made = heads.producer()
    return made is not None and _into_outputs(graph, made.inputs[0], shared[:, 0].reshape(-1), products, changes)


def attention_of(value: ir.Value | None) -> ir.Node | None:
    """The attention whose heads side by side are ``value``."""
    for operator in ("Reshape", "Transpose"):
        node = producer_if(value, operator)
        value = None if node is None else node.inputs[0]
    return producer_if(value, "Attention")


def _values_of(value: ir.Value | None) -> ir.Value | None:
    """A step's own values [B, N, heads, channels], which attention reads as ``value``, if nothing but it and the caches does."""
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "Reshape":
        return value
    if node.op_type == "Concat":  # the other rows come from a cache
        found = [made for each in node.inputs if (made := _values_of(each)) is not None]
        return found[0] if len(found) == 1 else None
    at = _FROM_VALUES.get(node.op_type)
    return None if at is None else _values_of(node.inputs[at])


def _into_outputs(
    graph: ir.Graph,
    value: ir.Value | None,
    factors: np.ndarray,
    products: Mapping[ir.Value, ir.Node],
    changes: dict[ir.Node, _Change],
) -> bool:
    """Let the product, and its bias, that alone makes ``value``, which is read once, take 1/factors."""
    biased = producer_if(value, "Add")
    inner = value if biased is None else next((each for each in biased.inputs if each in products), None)
    if value is None or inner is None or inner not in products or len(value.uses()) > 1 or len(inner.uses()) > 1:
        return False
    product = products[inner]
    biases = [(node, index) for node in (biased, product) if node is not None for index in _biases(node, len(factors))]
    if len(biases) != (biased is not None) + (product.op_type == "Gemm" and len(product.inputs) > 2):
        return False
    for node, index in biases:
        _divide(graph, node, index, factors)
    changes.setdefault(product, _Change()).divisors = factors
    return True


def _biases(node: ir.Node, size: int) -> list[int]:
    first = {"Add": 0, "Gemm": 2}.get(node.op_type, len(node.inputs))
    return [index for index, value in enumerate(node.inputs) if index >= first and _is_vector(value, size)]


def _is_vector(value: ir.Value | None, size: int) -> bool:
    return value is not None and value.const_value is not None and tuple(value.const_value.shape.numpy()) == (size,)


def _divide(graph: ir.Graph, node: ir.Node, index: int, factors: np.ndarray) -> None:
    """Give ``node`` a vector of its own in place of input ``index``."""
    vector = node.inputs[index]
    assert vector is not None and vector.const_value is not None
    array = vector.const_value.numpy()
    tensor = ir.tensor((array / factors).astype(array.dtype), name=f"{node.name}/smoothed.{index}")
    made = ir.Value(name=tensor.name, type=vector.type, shape=vector.shape, const_value=tensor)
    _replace(graph, node, index, made)


def _replace(graph: ir.Graph, node: ir.Node, index: int, made: ir.Value) -> None:
    old = node.inputs[index]
    graph.register_initializer(made)
    node.replace_input_with(index, made)
    if old is not None and old.name is not None and not old.uses():
        graph.initializers.pop(old.name, None)


def _rewrite(graph: ir.Graph, node: ir.Node, change: _Change) -> None:
    """A weight of its own for ``node``, changed."""
    found = weight_of(node)
    assert found is not None and found.value.const_value is not None
    tensor = found.value.const_value
    made = ir.Value(name=f"{node.name}/smoothed.weight", type=found.value.type, shape=found.value.shape)
    made.const_value = lazy(made, partial(_changed, tensor, found, change), tensor.dtype, tensor.shape)
    _replace(graph, found.user, found.index, made)


def _changed(tensor: ir.TensorProtocol, found: Weight, change: _Change) -> np.ndarray:
    result = tensor.numpy().astype(np.float32)
    release(tensor)
    divisors = None if change.divisors is None else 1 / change.divisors
    for factors, axis in ((change.multipliers, 1 - found.axis), (divisors, found.axis)):
        if factors is not None:
            result *= factors[None] if axis else factors[:, None]
    with np.errstate(over="ignore"):  # to infinity, refused below
        changed = result.astype(tensor.dtype.numpy())
    if not np.isfinite(changed).all():
        raise QuantisationError(f"the smoothed weight {tensor.name} overflows", hint="calibrate with --smooth 0.5, or off")
    return changed
