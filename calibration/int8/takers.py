"""Decides which activations can be smoothed for free, and what takes 1/factors of each. ``scales.json`` records the decision.

Smoothing divides the channels of an activation by factors and multiplies the weights that read it with them. The division is free
where a constant or a weight before the activation takes it::

    norm     n = vector · x            vector / factors
    layer    m = f(gate) · (x Wᵀ + b)  rows of W and b / factors
    values   a = softmax(q kᵀ) v       rows of the layer that makes v / factors, one factor for all queries that share a head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.files.scales_file import Taker
from .matmuls import Matmul, StepGraph

_FROM_VALUES = {"Slice": 0, "TensorScatter": 1, "GatherElements": 0, "Transpose": 0}
"""Operators between a step's own values and attention: by operator, the input that their rows come in by."""


@dataclass(frozen=True, slots=True)
class Smoothable:
    """An activation that can be smoothed: (name, axis) of every weight that reads it, and what takes 1/factors."""

    readers: Sequence[tuple[str, int]]
    taker: Taker

    @property
    def heads(self) -> tuple[int, int] | None:
        """Heads of values, and query heads that share each; None where attention doesn't make the activation."""
        return (self.taker.heads, self.taker.queries) if self.taker.kind == "values" else None


def smoothable(graph: StepGraph) -> dict[str, Smoothable]:
    """Find the activations that only matmuls of the backbone read, and whose factors something before can take."""
    by_activation: dict[str, list[Matmul]] = {}
    for matmul in graph.matmuls:
        by_activation.setdefault(matmul.activation, []).append(matmul)
    found = {}
    for name, matmuls in by_activation.items():
        read_elsewhere = name in graph.outputs or sorted(graph.readers[name]) != sorted(matmul.name for matmul in matmuls)
        if read_elsewhere or any(matmul.of_heads for matmul in matmuls):
            continue
        taker = _taker(graph, name, matmuls[0].channels)
        if taker is not None:
            found[name] = Smoothable(list(dict.fromkeys((matmul.weight, matmul.axis) for matmul in matmuls)), taker)
    return found


def _taker(graph: StepGraph, activation: str, channels: int) -> Taker | None:
    made = graph.producer(activation)
    if made is None or made.op_type != "Mul" or made.domain:
        return _values_taker(graph, made, channels)
    for name in made.input:
        if graph.is_vector(name, channels):
            return Taker("norm", name)
    layers = (_own_layer(graph, name, channels) for name in made.input)
    return next((Taker("layer", layer) for layer in layers if layer is not None), None)


def _values_taker(graph: StepGraph, made: Any, channels: int) -> Taker | None:
    """Find the layer of the values, if ``made`` puts the heads of attention side by side.

    Channel c of a query's head is a mean of channel c of its head of values, so that layer's outputs can take the factors.
    """
    while made is not None and made.op_type in ("Reshape", "Transpose"):
        made = graph.producer(made.input[0])
    values = None if made is None or made.op_type != "Attention" else _step_values(graph, made.input[2])
    heads, size = graph.value_shape
    width = heads * size
    layer = None if values is None or channels % width else _own_layer(graph, values, width)
    return None if layer is None else Taker("values", layer, heads, channels // width)


def _step_values(graph: StepGraph, name: str) -> str | None:
    """Find the tensor [B, N, heads · channels] of a step's own values, if nothing but attention and the caches reads it."""
    made = graph.producer(name)
    if made is None or len(graph.readers[name]) != 1:
        return None
    if made.op_type == "Reshape":
        return str(made.input[0])
    if made.op_type == "Concat":  # the other rows come from a cache
        found = [values for each in made.input if (values := _step_values(graph, each)) is not None]
        return found[0] if len(found) == 1 else None
    at = _FROM_VALUES.get(made.op_type)
    return None if at is None else _step_values(graph, made.input[at])


def _own_layer(graph: StepGraph, name: str, channels: int) -> str | None:
    """Find the matmul, perhaps with a constant bias [channels], that makes ``name``, if only one node reads that."""
    made = graph.producer(name)
    if made is not None and made.op_type == "Add" and not made.domain:
        inner = [each for each in made.input if not graph.is_vector(each, channels)]
        if len(inner) != 1 or not _read_once(graph, name):
            return None
        name = inner[0]
        made = graph.producer(name)
    if made is None or not _read_once(graph, name):
        return None
    weight, transposed = graph.weight_of(made)
    if weight is None or weight.dims[0 if transposed else 1] != channels:
        return None
    bias = made.input[2] if len(made.input) > 2 else ""  # Gemm's
    return str(made.name) if not bias or graph.is_vector(bias, channels) else None


def _read_once(graph: StepGraph, name: str) -> bool:
    return len(graph.readers[name]) == 1 and name not in graph.outputs
