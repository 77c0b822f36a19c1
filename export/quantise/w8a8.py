"""Puts activations into 8 bits, too: they go through QuantizeLinear and DequantizeLinear, of standard operators only.

Scales are symmetric, one an activation, as TensorRT takes them. With weights of the same format (:mod:`.engine_weights`) the
matmul multiplies int8 or fp8. Before int8, activations are smoothed (:mod:`.smooth_standard`). An activation that one int8 scale
can't serve stays as it is. The weight of its matmul is int8 all the same, so that costs no bytes. An fp8 number has an exponent
of its own: one scale serves all activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...runtime.arguments import settle, strings
from ...runtime.errors import UsageError
from ...runtime.executors import step_io
from ...runtime.files.scales_file import LEVELS, Scales
from ..passes.matmuls import MATMULS
from ..passes.patterns import new_constant
from .blocks import Moments
from .engine_formats import BLOCKS, DEFAULT_BLOCK, FORMATS, LARGEST_FP8, Rounding
from .engine_weights import QuantisationReport, holds_few_bits, quantise_weights, weight_of
from .smooth_standard import GRID, fold_smoothing
from .takers import attention_of

LARGEST_ERROR = 4e-4
"""Largest relative squared error of a matmul. If int8 is simulated to change it more, its activation stays as it is."""
OF_ATTENTION = 4.0
"""Factor for attention's output matmul: it adds little to the hidden state, so its error may be larger (docs/calibration.md)."""
HEADROOM = 2.0
"""Factor of fp8's range over what calibration saw: what it didn't see isn't clipped, and an exponent bit less costs little."""
_SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)
_CHOICES = ("fp16", *FORMATS)
_OTHER_PARTS = {"int8": "int8", "int4": "int8", "fp8": "int8"}
"""Precision of projection and heads by the backbone's, unless they are given one. Their activations stay fp16."""
_WEIGHTS_ALONE = "block"
"""Grid whose factors are folded in for int4: its activations stay fp16, so no channel of theirs has to be tamed."""
_ZEROS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


@dataclass(frozen=True, slots=True)
class PrecisionOptions:
    """Chooses what goes into few bits, beside the precision of the backbone's weights.

    ``scales``: int8 and fp8 put the backbone's activations into 8 bits, too; int8 and int4 smooth them first. ``keep``: layers of
    the backbone whose activations stay as they are, by their names in ``scales``. None keeps those whose simulated int8 error is
    above ``LARGEST_ERROR``, and none in fp8. ``projection`` (onto the vocabulary) and ``heads``: of weights; None takes the
    backbone's, and int8 for int4 and fp8. ``block``: inputs that share an int4 scale.
    """

    scales: Path | None = None
    keep: tuple[str, ...] | None = None
    projection: str | None = None
    heads: str | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        settle(self, {})
        if self.keep is not None:
            object.__setattr__(self, "keep", strings("keep", self.keep))
        for name in ("projection", "heads"):
            if getattr(self, name) not in (None, *_CHOICES):
                raise UsageError(f"{name} in {getattr(self, name)!r}", hint=f"one of {', '.join(_CHOICES)}")
        if self.keep is not None and self.scales is None:
            raise UsageError("activations are kept, but none would be in 8 bits without scales", hint="give --scales as well")
        if self.block is not None and self.block not in BLOCKS:
            raise UsageError(f"blocks of {self.block} inputs", hint=f"one of {', '.join(map(str, BLOCKS))}")

    def of_part(self, part: str, precision: str) -> str:
        """Return the precision of the weights of a part: ``backbone``, ``projection`` or ``heads``."""
        return precision if part == "backbone" else getattr(self, part) or _OTHER_PARTS.get(precision, precision)

    def precisions(self, precision: str) -> set[str]:
        """Return every precision that occurs if the backbone's is ``precision``."""
        return {self.of_part(part, precision) for part in ("backbone", "projection", "heads")}


DEFAULTS = PrecisionOptions()


def quantise_network(
    model: ir.Model,
    options: PrecisionOptions,
    scales: Scales | None,
    precision: str = "int8",
    moments: Mapping[str, Moments] | None = None,
) -> QuantisationReport:
    """Rewrite a step graph, or the graph of the heads alone, in place, as engines are built of it.

    ``moments``: see :class:`.engine_formats.Rounding`; by the names of weights.

    Raises:
        UsageError: a layer to keep isn't there.
    """
    graph = model.graph
    part = parts(graph)
    exported = {str(node.name): str(found.value.name) for node in graph if (found := weight_of(node)) is not None}
    factors: dict[str, np.ndarray] = {}
    if scales is not None and "backbone" in part.values():
        if precision == "int4":
            factors = _smooth(graph, scales, part)
        else:
            quantise_activations(model, scales, options.keep, precision)
    precisions = {name: options.of_part(of, precision) for name, of in part.items()}
    skipped = {name for name, found in precisions.items() if found == "fp16"}
    smoothed = {name: (weight, factors.get(name)) for name, weight in exported.items()}
    rounding = Rounding(options.block or DEFAULT_BLOCK, (moments or {}).get)
    return quantise_weights(model, skipped, precisions, rounding, smoothed)


def _smooth(graph: ir.Graph, scales: Scales, part: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Smooth the backbone's activations for weights in int4. Returns the factors by the matmuls that read them."""
    layers = {name: layer.activation for name, layer in scales.layers.items() if part.get(name) == "backbone"}
    done = fold_smoothing(graph, scales, dict.fromkeys(layers.values()), _WEIGHTS_ALONE)
    return {name: scales.smoothing[read][_WEIGHTS_ALONE].factors for name, read in layers.items() if read in done}


def quantise_activations(
    model: ir.Model, scales: Scales, keep: Iterable[str] | None = None, precision: str = "int8"
) -> list[str]:
    """Quantise the activations of the backbone's matmuls, in place; int8 smooths them first. Returns the matmuls' names.

    ``keep``: see :class:`PrecisionOptions`.

    Raises:
        UsageError: a layer to keep isn't there.
    """
    graph = model.graph
    part = parts(graph)
    layers = {name: layer.activation for name, layer in scales.layers.items() if part.get(name) == "backbone"}
    nodes = {str(node.name): node for node in graph if node.name in layers}
    kept = {name for name in layers if precision == "int8" and _spoils(nodes[name], scales)} if keep is None else set(keep)
    unknown = sorted(kept - set(layers))
    if unknown:
        raise UsageError(f"no layer {unknown[0]!r} to keep", hint=f"the backbone's are {', '.join(list(layers)[:3])} …")
    readers: dict[str, list[ir.Node]] = {}
    for name, activation in layers.items():
        if name not in kept and holds_few_bits(nodes[name]):
            readers.setdefault(activation, []).append(nodes[name])
    smoothed = fold_smoothing(graph, scales, readers) if precision == "int8" else set()
    for activation, found in readers.items():
        _quantise(graph, found, activation_scale(scales, activation, precision, smoothed=activation in smoothed), precision)
    return [str(node.name) for found in readers.values() for node in found]


def _spoils(matmul: ir.Node, scales: Scales) -> bool:
    """True if int8 changes a matmul too much, or its activation if smoothing wasn't tried."""
    activation = scales.layers[str(matmul.name)].activation
    tried = scales.smoothing.get(activation)
    error = tried[GRID].error if tried else scales.activations[activation].relative_error ** 2
    return error > LARGEST_ERROR * (OF_ATTENTION if attention_of(matmul.inputs[0]) is not None else 1)


def activation_scale(scales: Scales, activation: str, precision: str = "int8", *, smoothed: bool) -> float:
    """Return the scale of a whole activation. A smoothed one clips nothing that was seen: ranges were chosen without factors."""
    entry = scales.activations[activation]
    if precision == "fp8":
        return entry.scale * LEVELS * HEADROOM / LARGEST_FP8
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


def _quantise(graph: ir.Graph, readers: list[ir.Node], scale: float, precision: str) -> None:
    """Put one QuantizeLinear behind the activation that all ``readers`` read, and a DequantizeLinear before each."""
    value = readers[0].inputs[0]
    assert value is not None and value.dtype is not None
    if value.dtype == ir.DataType.FLOAT16:
        scale = max(scale, _SMALLEST_HALF)
    constants = [
        new_constant(graph, np.array(scale, value.dtype.numpy()), f"{value.name}/{precision}.scale"),
        new_constant(graph, np.array(0, _ZEROS[precision]), f"{value.name}/{precision}.zero_point"),
    ]
    quantise = ir.node("QuantizeLinear", [value, *constants], name=f"{value.name}/quantise")
    steps = quantise.outputs[0]
    kind = ir.DataType.from_numpy(_ZEROS[precision])
    steps.name, steps.type, steps.shape = f"{value.name}/{precision}", ir.TensorType(kind), value.shape
    order = {node: index for index, node in enumerate(graph)}
    graph.insert_before(min(readers, key=order.__getitem__), [quantise])
    for reader in readers:
        dequantise = ir.node("DequantizeLinear", [steps, *constants], name=f"{reader.name}/dequantise.0")
        dequantise.outputs[0].name = f"{reader.name}/dequantised.0"
        dequantise.outputs[0].type, dequantise.outputs[0].shape = value.type, value.shape
        graph.insert_before(reader, [dequantise])
        reader.replace_input_with(0, dequantise.outputs[0])
