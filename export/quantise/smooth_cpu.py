"""Smooths the CPU graph: divides the channels of an activation by factors and multiplies the weights that read it with them.

G. Xiao et al., SmoothQuant (arXiv 2211.10438), section 4. The division costs nothing where something before the activation takes
it: the weight of an RMS norm, or the output channels of the up matmul, which is multiplied with an MLP's gate. ``scales.json``
says what takes the factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from ...runtime.files.scales_file import Scales, Smoothing
from ..passes.matmuls import CpuMatmul
from ..passes.patterns import new_constant

GRID = "block"
_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
"""Fused norms: by operator, the input that its weight is."""


def smooth(
    graph: ir.Graph,
    matmuls: Sequence[CpuMatmul],
    scales: Scales,
    values: Collection[ir.Value],
    others: Mapping[ir.Value, Smoothing] = MappingProxyType({}),
) -> list[ir.Value]:
    """Take the factors of ``scales`` for these ``values`` into norms and matmuls, in place.

    ``others``: factors of values that don't have those of blocks.

    ``scales`` have to say what takes the factors (:func:`.takers.with_takers`). An activation stays as it is if its taker isn't
    there as such: the CPU graph computes a norm in several nodes, or multiplies queries, keys and values in one.
    Returns the activations that were smoothed.
    """
    activations = activations_of(matmuls, scales)
    by_value: dict[ir.Value, list[CpuMatmul]] = {}
    for matmul in matmuls:
        by_value.setdefault(matmul.activation, []).append(matmul)
    holders = [(str(weight.name), matmul, index) for matmul in matmuls for index, weight in enumerate(matmul.weights)]
    shared = Counter(name for name, _matmul, _index in holders)
    by_weight = {name: (matmul, index) for name, matmul, index in holders if shared[name] == 1}
    done = []
    for value, readers in by_value.items():
        name = activations.get(readers[0])
        found, taker = others.get(value, scales.smoothing.get(name or "", {}).get(GRID)), scales.takers.get(name or "")
        if value not in values or name is None or found is None or found.alpha is None or taker is None:
            continue
        if len(value.uses()) > len(readers) or value.is_graph_output():
            continue
        if taker.kind == "norm":
            taken = _divide_norm(graph, value.producer(), found.factors)
        else:
            taken = taker.kind == "layer" and _divide_outputs(
                by_weight.get(scales.layers[taker.name].weight), value.producer(), found.factors
            )
        if taken:
            for reader in readers:
                reader.multipliers = reader.multipliers * found.factors
            done.append(value)
    return done


def activations_of(matmuls: Sequence[CpuMatmul], scales: Scales) -> dict[CpuMatmul, str]:
    """Find the standard graph's name of each matmul's activation, by the weight's name: both graphs have the same."""
    names = {layer.weight: layer.activation for layer in scales.layers.values()}
    return {matmul: names[str(matmul.weights[0].name)] for matmul in matmuls if matmul.weights[0].name in names}


def _divide_norm(graph: ir.Graph, norm: ir.Node | None, factors: np.ndarray) -> bool:
    """Give a fused norm a weight of its own, divided; False where ``norm`` is another operator."""
    if norm is None or norm.op_type not in _NORMS:
        return False
    index = _NORMS[norm.op_type]
    weight = norm.inputs[index]
    assert weight is not None and weight.const_value is not None
    smoothed = (weight.const_value.numpy() / factors).astype(np.float32)
    norm.replace_input_with(index, new_constant(graph, smoothed, f"{norm.name}/smoothed"))  # norms may share a weight
    return True


def _divide_outputs(holder: tuple[CpuMatmul, int] | None, gated: ir.Node | None, factors: np.ndarray) -> bool:
    """Divide the outputs of one weight of a matmul that ``gated`` multiplies.

    False where several matmuls share the weight, or a bias is added in between.
    """
    if holder is None or gated is None:
        return False
    matmul, index = holder
    outputs = matmul.node.outputs[0]
    if len(matmul.weights) > 1:
        splits = [node for node in outputs.consumers() if node.op_type == "Split"]
        outputs = splits[0].outputs[index] if len(splits) == 1 else outputs
    if outputs not in gated.inputs or len(outputs.uses()) > 1:
        return False
    widths = matmul.widths
    divisors = np.broadcast_to(matmul.divisors, (sum(widths),)).copy()
    divisors[sum(widths[:index]) : sum(widths[: index + 1])] *= factors
    matmul.divisors = divisors
    return True
