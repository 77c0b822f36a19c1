"""Finds what takes smoothing factors, for scales of older versions: since then ``calibrate`` decides and records it.

Its decision can't be imported: export and calibration don't know each other. A test holds both to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import Scales, Smoothing, Taker
from ..passes.patterns import producer_if
from ..weights import read_graph
from .engine_weights import weight_of

_FROM_VALUES = {"Slice": 0, "TensorScatter": 1, "GatherElements": 0, "Transpose": 0}
"""Operators between a step's own values and attention: by operator, the input that their rows come in by."""


def with_takers(scales: Scales, bundle: Bundle) -> Scales:
    """Add what takes factors, found in the bundle's standard graph, to scales of an older version."""
    if scales.takers or not scales.smoothing:
        return scales
    graph = read_graph(bundle.path(bundle.manifest.graph("standard"))).graph
    return replace(scales, takers=find_takers(graph, scales.smoothing))


def find_takers(graph: ir.Graph, smoothing: Mapping[str, Mapping[str, Smoothing]]) -> dict[str, Taker]:
    """Find what takes 1/factors of each smoothed activation that only layers read; others are left out."""
    layers = {node.outputs[0]: node for node in graph if weight_of(node) is not None}
    by_name = {value.name: value for node in layers.values() if (value := node.inputs[0]) is not None}
    found = {}
    for name, grids in smoothing.items():
        value = by_name.get(name)
        if value is None or value.is_graph_output():
            continue
        if any(use.node.outputs[0] not in layers or use.node.inputs[0] is not value for use in value.uses()):
            continue
        channels = next((len(entry.factors) for entry in grids.values()), 0)
        taker = _taker(value, channels, layers) or _values_taker(value, channels, layers)
        if taker is not None:
            found[name] = taker
    return found


def attention_of(value: ir.Value | None) -> ir.Node | None:
    """Find the attention whose heads side by side are ``value``."""
    for operator in ("Reshape", "Transpose"):
        node = producer_if(value, operator)
        value = None if node is None else node.inputs[0]
    return producer_if(value, "Attention")


def biases_of(layer: ir.Node, channels: int) -> list[tuple[ir.Node, int]]:
    """List the constant vectors [channels] that are added to a layer's outputs, by the node and the input that read them."""
    uses = layer.outputs[0].uses()
    added = [(use.node, 1 - use.idx) for use in uses if use.node.op_type == "Add" and len(uses) == 1]
    gemm = [(layer, 2)] if layer.op_type == "Gemm" and len(layer.inputs) > 2 else []
    return [(node, index) for node, index in (*added, *gemm) if is_vector(node.inputs[index], channels)]


def is_vector(value: ir.Value | None, size: int) -> bool:
    """True if a value is a constant [size]."""
    return value is not None and value.const_value is not None and tuple(value.const_value.shape.numpy()) == (size,)


def _taker(value: ir.Value, channels: int, layers: Mapping[ir.Value, ir.Node]) -> Taker | None:
    """Find the norm, or the layer, that ``value`` is a multiple of."""
    scaled = producer_if(value, "Mul")
    if scaled is None:
        return None
    for vector in scaled.inputs:
        if vector is not None and is_vector(vector, channels):
            return Taker("norm", str(vector.name))
    found = (_own_layer(each, channels, layers) for each in scaled.inputs)
    return next((Taker("layer", layer) for layer in found if layer is not None), None)


def _values_taker(value: ir.Value, channels: int, layers: Mapping[ir.Value, ir.Node]) -> Taker | None:
    """Find the layer of the values that attention makes ``value`` of."""
    attention = attention_of(value)
    heads = None if attention is None else _step_values(attention.inputs[2])
    made = None if heads is None else heads.producer()
    sizes = () if heads is None or heads.shape is None else heads.shape[-2:]
    if made is None or not all(isinstance(size, int) for size in sizes):
        return None
    width = int(np.prod(sizes))  # type: ignore[arg-type]
    layer = None if channels % width else _own_layer(made.inputs[0], width, layers)
    return None if layer is None else Taker("values", layer, int(sizes[0]), channels // width)  # type: ignore[arg-type]


def _step_values(value: ir.Value | None) -> ir.Value | None:
    """Find a step's own values [B, N, heads, channels] behind ``value``, if nothing but attention and the caches reads them."""
    node = None if value is None else value.producer()
    if value is None or node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "Reshape":
        return value
    if node.op_type == "Concat":  # the other rows come from a cache
        found = [made for each in node.inputs if (made := _step_values(each)) is not None]
        return found[0] if len(found) == 1 else None
    at = _FROM_VALUES.get(node.op_type)
    return None if at is None else _step_values(node.inputs[at])


def _own_layer(value: ir.Value | None, channels: int, layers: Mapping[ir.Value, ir.Node]) -> str | None:
    """Find the layer that makes ``value``, perhaps with a bias, if only one node reads both."""
    biased = producer_if(value, "Add")
    inner = value if biased is None else next((each for each in biased.inputs if each in layers), None)
    if value is None or inner is None or inner not in layers or len(value.uses()) > 1 or len(inner.uses()) > 1:
        return None
    layer = layers[inner]
    added = (biased is not None) + (layer.op_type == "Gemm" and len(layer.inputs) > 2)
    return str(layer.name) if len(biases_of(layer, channels)) == added else None
