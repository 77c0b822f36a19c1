"""Computes products of the CPU graph in 8-bit integers: one scale for an activation, one for each output of a weight.

Such a product costs a little more than MatMulNBits for one row, and much less for each further one (docs/notes/cost-of-rows.md).
Only what reads a norm gets it: products of layers where calibration found as small an error as engines allow (:mod:`.w8a8`), and
the vocabulary projection, whose largest logits are computed again. A norm brings all tokens to one magnitude, so one scale suits
them. Integers can't be NaN; the residual stream beside them can.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...runtime.files.scales_file import LEVELS, Scales, Smoothing
from ..passes.matmuls import CpuMatmul
from ..passes.patterns import MICROSOFT, Nodes, new_constant
from .blocks import Grid
from .smooth_cpu import activations_of
from .smooth_standard import GRID
from .w8a8 import LARGEST_ERROR, activation_scale

_MIDDLE = 128
_ALPHA = 0.5
"""Of the projection, whose smoothing calibration doesn't search: SmoothQuant's own default."""


@dataclass(frozen=True, slots=True, eq=False)
class Suited:
    """An activation that one ``scale`` suits once it has been divided by its factors."""

    smoothing: Smoothing
    scale: float


def suited(matmuls: Sequence[CpuMatmul], scales: Scales) -> dict[ir.Value, Suited]:
    """Find activations of norms that one scale suits. All of ``matmuls`` are to be in 8 bits."""
    names = activations_of(matmuls, scales)
    found = {}
    for matmul in matmuls:
        name = names.get(matmul, "")
        taker, entry = scales.takers.get(name), scales.smoothing.get(name, {}).get(GRID)
        if matmul.is_projection and name in scales.activations:
            found[matmul.activation] = _of_projection(matmul, scales.activations[name].channel_maxima)
        elif taker is not None and taker.kind == "norm" and entry is not None and entry.error <= LARGEST_ERROR:
            found[matmul.activation] = Suited(entry, activation_scale(scales, name, smoothed=True))
    return found


def _of_projection(matmul: CpuMatmul, maxima: np.ndarray) -> Suited:
    """Smooth what the projection reads, of largest magnitudes ``maxima`` [H]."""
    weights = np.max([np.abs(piece).max(0) for piece in matmul.pieces()], 0)
    alive = (maxima > 0) & (weights > 0)
    factors = np.ones_like(maxima)
    factors[alive] = maxima[alive] ** _ALPHA / weights[alive] ** (1 - _ALPHA)
    return Suited(Smoothing(_ALPHA, 0.0, 0.0, factors), float((maxima / factors).max()) / LEVELS)


class IntegerProducts:
    """Makes integer products in the place of products. Those that read one activation share its rounding.

    ``smoothed``: activations whose norm took the factors; others are multiplied.
    """

    def __init__(self, graph: ir.Graph, suited: Mapping[ir.Value, Suited], smoothed: Collection[ir.Value]) -> None:
        self._graph = graph
        self._suited, self._smoothed = suited, smoothed
        self._rounded: dict[ir.Value, list[ir.Value]] = {}

    def __contains__(self, matmul: CpuMatmul) -> bool:
        return matmul.activation in self._suited

    def take_factors(self, matmul: CpuMatmul) -> None:
        """Multiply the weight of a product with the factors of its activation, unless smoothing did."""
        if matmul.activation not in self._smoothed:
            matmul.multipliers = matmul.multipliers * self._suited[matmul.activation].smoothing.factors

    def make(self, matmul: CpuMatmul, grid: Grid, codes: np.ndarray) -> tuple[ir.Node, int]:
        """Make the product of a weight with one block of all its inputs, in no graph yet. Returns it and its weights' bytes."""
        name = matmul.node.name
        weight = np.ascontiguousarray((codes[:, 0] ^ np.uint8(_MIDDLE)).view(np.int8).T)  # [K, N], code − 128
        scales = np.ascontiguousarray(grid.scales[:, 0])
        rounded, scale, middle = self._round(matmul.activation)
        stored = new_constant(self._graph, weight, f"{name}/weight")
        factors = new_constant(self._graph, scales, f"{name}/scales")
        product = Nodes(self._graph, f"{name}/integers")
        product.add("MatMulIntegerToFloat", [rounded, stored, scale, factors, middle], domain=MICROSOFT)
        return product.nodes[0], weight.nbytes + scales.nbytes

    def _round(self, activation: ir.Value) -> list[ir.Value]:
        """Return an activation as uint8, its scale, and its zero point."""
        if activation not in self._rounded:
            found = self._suited[activation]
            build = Nodes(self._graph, f"{activation.name}/rounded")
            smoothed = activation
            if activation not in self._smoothed and (found.smoothing.factors != 1).any():
                smoothed = build.add("Mul", [activation, build.constant("shares", 1 / found.smoothing.factors, np.float32)])
            scale, middle = build.constant("scale", found.scale, np.float32), build.constant("middle", _MIDDLE, np.uint8)
            rounded = build.add("QuantizeLinear", [smoothed, scale, middle])
            maker = activation.producer()
            assert maker is not None, "a layer reads what a node made"
            self._graph.insert_after(maker, build.nodes)
            self._rounded[activation] = [rounded, scale, middle]
        return self._rounded[activation]
