"""Puts activations into 8 bits, too: they go through QuantizeLinear and DequantizeLinear, of standard operators only.

Scales are symmetric, one an activation, as TensorRT takes them. With int8 weights beside it (:mod:`.engine_weights`) the matmul
multiplies integers. Smoothing (:mod:`.smooth_standard`) comes first. An activation that one scale can't serve stays as it is. The
weight of its matmul is int8 all the same, so that costs no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...runtime.arguments import settle, strings
from ...runtime.errors import UsageError
from ...runtime.executors import step_io
from ...runtime.files.scales_file import LEVELS, Scales
from ..passes.matmuls import MATMULS
from ..passes.patterns import new_constant
from .engine_weights import QuantisationReport, holds_8_bits, quantise_weights
from .smooth_standard import GRID, fold_smoothing
from .takers import attention_of

LARGEST_ERROR = 4e-4
"""Largest relative squared error of a matmul. If int8 is simulated to change it more, its activation stays as it is."""
OF_ATTENTION = 4.0
"""Factor for attention's output matmul: it adds little to the hidden state, so its error may be larger (docs/calibration.md)."""
_SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)
_CHOICES = ("int8", "fp16")


@dataclass(frozen=True, slots=True)
class Int8Options:
    """Chooses what goes into 8 bits. Without ``scales`` only weights do.

    ``keep``: layers of the backbone whose activations stay as they are, by their names in ``scales``. None keeps the layers whose
    simulated error is above ``LARGEST_ERROR``. ``projection`` (onto the vocabulary) and ``heads``: int8 (weights only) or fp16.
    """

    scales: Path | None = None
    keep: tuple[str, ...] | None = None
    projection: str = "int8"
    heads: str = "int8"

    def __post_init__(self) -> None:
        settle(self, {})
        if self.keep is not None:
            object.__setattr__(self, "keep", strings("keep", self.keep))
        for name in ("projection", "heads"):
            if getattr(self, name) not in _CHOICES:
                raise UsageError(f"{name} in {getattr(self, name)!r}", hint=f"one of {', '.join(_CHOICES)}")
        if self.keep is not None and self.scales is None:
            raise UsageError("activations are kept, but none would be in int8 without scales", hint="give --scales as well")


WEIGHTS_ONLY = Int8Options()


def quantise_network(model: ir.Model, options: Int8Options, scales: Scales | None) -> QuantisationReport:
    """Rewrite a step graph, or the graph of the heads alone, in place, as engines are built of it.

    Raises:
        UsageError: a layer to keep isn't there.
    """
    part = parts(model.graph)
    if scales is not None and "backbone" in part.values():
        quantise_activations(model, scales, options.keep)
    in_half = {name for name in ("projection", "heads") if getattr(options, name) == "fp16"}
    return quantise_weights(model, {name for name, of in part.items() if of in in_half})


def quantise_activations(model: ir.Model, scales: Scales, keep: Iterable[str] | None = None) -> list[str]:
    """Smooth a step graph and quantise the activations of the backbone's matmuls, in place. Returns the matmuls' names.

    ``keep``: see :class:`Int8Options`.

    Raises:
        UsageError: a layer to keep isn't there.
    """
    graph = model.graph
    part = parts(graph)
    layers = {name: layer.activation for name, layer in scales.layers.items() if part.get(name) == "backbone"}
    nodes = {str(node.name): node for node in graph if node.name in layers}
    kept = {name for name in layers if _spoils(nodes[name], scales)} if keep is None else set(keep)
    unknown = sorted(kept - set(layers))
    if unknown:
        raise UsageError(f"no layer {unknown[0]!r} to keep", hint=f"the backbone's are {', '.join(list(layers)[:3])} …")
    readers: dict[str, list[ir.Node]] = {}
    for name, activation in layers.items():
        if name not in kept and holds_8_bits(nodes[name]):
            readers.setdefault(activation, []).append(nodes[name])
    smoothed = fold_smoothing(graph, scales, readers)
    for activation, found in readers.items():
        _quantise(graph, found, activation_scale(scales, activation, smoothed=activation in smoothed))
    return [str(node.name) for found in readers.values() for node in found]


def _spoils(matmul: ir.Node, scales: Scales) -> bool:
    """True if int8 changes a matmul too much, or its activation if smoothing wasn't tried."""
    activation = scales.layers[str(matmul.name)].activation
    tried = scales.smoothing.get(activation)
    error = tried[GRID].error if tried else scales.activations[activation].relative_error ** 2
    return error > LARGEST_ERROR * (OF_ATTENTION if attention_of(matmul.inputs[0]) is not None else 1)


def activation_scale(scales: Scales, activation: str, *, smoothed: bool) -> float:
    """Return the scale of a whole activation. A smoothed one clips nothing that was seen: ranges were chosen without factors."""
    entry = scales.activations[activation]
    if not smoothed:
        return entry.scale
    return float((entry.channel_maxima / scales.smoothing[activation][GRID].factors).max()) / LEVELS


def parts(graph: ir.Graph) -> Mapping[str, str]:
    """Tell for each matmul of a graph, by its name, if it belongs to the ``backbone``, ``projection`` or ``heads``."""
    outputs = {value.name: value for value in graph.outputs}
    backbone, projection = (_needed_by(outputs.get(name)) for name in (step_io.HIDDEN, step_io.LOGITS))
    return {
        str(node.name): "backbone" if node in backbone else "projection" if node in projection else "heads"
        for node in graph
        if node.op_type in MATMULS and not node.domain
    }


def _needed_by(value: ir.Value | None) -> set[ir.Node]:
    nodes: set[ir.Node] = set()
    open_values = [value]
    while open_values:
        value = open_values.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            open_values.extend(node.inputs)
    return nodes


def _quantise(graph: ir.Graph, readers: list[ir.Node], scale: float) -> None:
    """Put one QuantizeLinear behind the activation that all ``readers`` read, and a DequantizeLinear before each."""
    value = readers[0].inputs[0]
    assert value is not None and value.dtype is not None
    if value.dtype == ir.DataType.FLOAT16:
        scale = max(scale, _SMALLEST_HALF)
    constants = [
        new_constant(graph, np.array(scale, value.dtype.numpy()), f"{value.name}/int8.scale"),
        new_constant(graph, np.array(0, np.int8), f"{value.name}/int8.zero_point"),
    ]
    quantise = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}/quantise")
    steps = quantise.outputs[0]
    steps.name, steps.type, steps.shape = f"{value.name}/int8", ir.TensorType(ir.DataType.INT8), value.shape
    order = {node: index for index, node in enumerate(graph)}
    graph.insert_before(min(readers, key=order.__getitem__), [quantise])
    for reader in readers:
        dequantise = ir.node("DequantizeLinear", [steps, *constants], name=f"{reader.name}/dequantise.0")
        dequantise.outputs[0].name = f"{reader.name}/dequantised.0"
        dequantise.outputs[0].type, dequantise.outputs[0].shape = value.type, value.shape
        graph.insert_before(reader, [dequantise])
        reader.replace_input_with(0, dequantise.outputs[0])
