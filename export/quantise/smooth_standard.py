"""Smooths the standard and the device graph: factors go into norms, layers and their readers.

:mod:`.smooth_cpu` does the same on the CPU graph, whose operators are others. Here attention's output can be smoothed, too: the
layer of the values takes the factors, and the caches hold divided values. ``scales.json`` says what takes the factors.
Weights are computed when they are saved, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import onnx_ir as ir

from ...runtime.errors import QuantisationError
from ...runtime.files.scales_file import Scales
from .engine_formats import release
from .engine_weights import Weight, lazy, weight_of
from .takers import biases_of, find_takers

GRID = "tensor"


class _Change:
    """Collects the factors of one weight: ``multipliers`` of its inputs, ``divisors`` of its outputs."""

    def __init__(self) -> None:
        self.multipliers: np.ndarray | None = None
        self.divisors: np.ndarray | None = None


def fold_smoothing(graph: ir.Graph, scales: Scales, activations: Iterable[str], grid: str = GRID) -> set[str]:
    """Divide these activations by their factors of ``grid``, in place, and return those that were divided.

    An activation without factors, or without a taker, stays as it is; so does one that attention makes if query heads that share
    their values have different factors.
    """
    takers = scales.takers or find_takers(graph, scales.smoothing)
    layers = {str(node.name): node for node in graph if weight_of(node) is not None}
    by_name = {value.name: value for node in layers.values() if (value := node.inputs[0]) is not None}
    changes: dict[ir.Node, _Change] = {}
    done = set()
    for name in activations:
        found, taker, value = scales.smoothing.get(name, {}).get(grid), takers.get(name), by_name.get(name)
        if found is None or found.alpha is None or taker is None or value is None:
            continue
        if taker.kind == "norm":
            _divide_norm(graph, value, taker.name, found.factors)
        else:
            shared = found.factors.reshape(taker.heads, taker.queries, -1)
            if (shared != shared[:, :1]).any():
                continue
            _divide_layer(graph, layers[taker.name], shared[:, 0].reshape(-1), changes)
        for use in value.uses():
            changes.setdefault(use.node, _Change()).multipliers = found.factors
        done.add(name)
    for node, change in changes.items():
        _rewrite(graph, node, change)
    return done


def _divide_norm(graph: ir.Graph, value: ir.Value, vector: str, factors: np.ndarray) -> None:
    """Divide the constant vector that ``value`` is a multiple of."""
    scaled = value.producer()
    assert scaled is not None
    index = next(index for index, each in enumerate(scaled.inputs) if each is not None and each.name == vector)
    _divide(graph, scaled, index, factors)


def _divide_layer(graph: ir.Graph, layer: ir.Node, factors: np.ndarray, changes: dict[ir.Node, _Change]) -> None:
    """Divide the outputs of a layer, and its bias."""
    for node, index in biases_of(layer, len(factors)):
        _divide(graph, node, index, factors)
    changes.setdefault(layer, _Change()).divisors = factors


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
    """Give ``node`` a changed weight of its own."""
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
