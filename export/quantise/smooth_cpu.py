"""SmoothQuant's migration on the CPU graph: what a product reads is divided channel by channel, its weight multiplied.

G. Xiao et al., SmoothQuant (arXiv 2211.10438), section 4. The division costs nothing where something before takes it: the weight
of an RMS norm, or the output channels of the up product, which is multiplied with an MLP's gate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from ...runtime.files.scales_file import Scales
from ..passes.matmuls import CpuProduct
from ..passes.patterns import new_constant, producer_if

GRID = "block"
_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # operator to the input that its weight is


def smooth(graph: ir.Graph, products: Sequence[CpuProduct], scales: Scales, values: Collection[ir.Value]) -> list[str]:
    """Take the factors of ``scales`` for these ``values`` into norms and products, in place.

    Those whose factors nothing before can take stay as they are. Returns the activations that were smoothed.
    """
    activations = activations_of(products, scales)
    by_value: dict[ir.Value, list[CpuProduct]] = {}
    for product in products:
        by_value.setdefault(product.activation, []).append(product)
    by_output = {product.node.outputs[0]: product for product in products}
    done = []
    for value, readers in by_value.items():
        name = activations.get(readers[0])
        found = scales.smoothing.get(name, {}).get(GRID) if name is not None else None
        if value not in values or name is None or found is None or found.alpha is None:
            continue
        read_elsewhere = len(value.uses()) > len(readers) or value.is_graph_output()
        if not read_elsewhere and (_into_norm(graph, value, found.factors) or _into_product(value, found.factors, by_output)):
            for reader in readers:
                reader.multipliers = reader.multipliers * found.factors
            done.append(name)
    return done


def activations_of(products: Sequence[CpuProduct], scales: Scales) -> dict[CpuProduct, str]:
    """What the standard graph calls the activation that a product reads: both graphs have the same names of weights."""
    names = {layer.weight: layer.activation for layer in scales.layers.values()}
    return {product: names[str(product.weights[0].name)] for product in products if product.weights[0].name in names}


def _into_norm(graph: ir.Graph, value: ir.Value, factors: np.ndarray) -> bool:
    norm = value.producer()
    if norm is None or norm.op_type not in _NORMS or norm.outputs[0] is not value:
        return False
    index = _NORMS[norm.op_type]
    weight = norm.inputs[index]
    if weight is None or weight.const_value is None:
        return False
    smoothed = (weight.const_value.numpy() / factors).astype(np.float32)
    norm.replace_input_with(index, new_constant(graph, smoothed, f"{norm.name}/smoothed"))  # norms may share a weight
    return True


def _into_product(value: ir.Value, factors: np.ndarray, by_output: dict[ir.Value, CpuProduct]) -> bool:
    gated = producer_if(value, "Mul")
    for factor in () if gated is None else gated.inputs:
        if factor is None or len(factor.uses()) > 1:
            continue
        split = producer_if(factor, "Split")
        product = by_output.get(factor if split is None else split.inputs[0])  # type: ignore[arg-type]
        if product is None:
            continue
        index = 0 if split is None else list(split.outputs).index(factor)
        widths = product.widths
        if len(widths) <= index or widths[index] != len(factors):
            continue
        divisors = np.broadcast_to(product.divisors, (sum(widths),)).copy()
        divisors[sum(widths[:index]) : sum(widths[: index + 1])] *= factors
        product.divisors = divisors
        return True
    return False
