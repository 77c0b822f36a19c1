"""Rewrites the CPU graph with weights in 8 or 4 bits: matmuls become ONNX Runtime's MatMulNBits, or products in integers.

MatMulNBits rounds its activation to 8 bits in blocks of each row (accuracy level 4). Products in integers (:mod:`.cpu_w8a8`) have
a scale that calibration found. So a row of the result never depends on the rows beside it. docs/quantisation.md says what
rounding does to exactness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.arguments import settle, shown
from ...runtime.errors import QuantisationError, UsageError
from ...runtime.files.scales_file import Scales
from ..passes.matmuls import CpuMatmul, find_matmuls, plain_step_bytes
from ..passes.patterns import MICROSOFT, new_constant, new_node, take_place
from ..passes.rescore import rescore
from .blocks import Grid, Moments, compensated, make_grid, nearest, packed, rescaled
from .cpu_w8a8 import IntegerProducts, Suited, suited
from .smooth_cpu import smooth

PRECISIONS = (4, 8, 32)
BLOCKS = (16, 32, 64, 128)
DEFAULT_BLOCKS = {4: 32, 8: 128}
"""Block by bits. Products of five rows take a twelfth less with 128 than with 64; 4 bits can't afford the coarser scales."""
_ROUND_ACTIVATIONS_TO_INT8 = 4  # MatMulNBits' accuracy_level


@dataclass(frozen=True, slots=True)
class CpuPrecision:
    """Says how many bits each weight gets: 4, 8, or 32 for weights that stay as they are.

    ``layers``: bits of the backbone's layers. ``kept`` overrides it by the name of a :class:`.matmuls.CpuMatmul`.
    ``projection``: bits of the vocabulary projection. ``heads``: bits of those weights of heads that haven't 8 bits already
    (:mod:`.cpu_heads`). ``block``: inputs that share a scale; None takes ``DEFAULT_BLOCKS``, or the largest smaller block that
    divides a matmul's inputs. ``projection_block``: the same in the projection. ``rescored``: number of the largest logits that
    are computed again from the projection's own weights.
    """

    layers: int = 8
    projection: int = 8
    heads: int = 8
    block: int | None = None
    projection_block: int = 64
    rescored: int = 8
    kept: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self, {})
        if not isinstance(self.kept or {}, Mapping):
            raise UsageError(f"kept is {shown(self.kept)}", hint="kept is bits by the names of matmuls")
        object.__setattr__(self, "kept", dict(self.kept or {}))
        for bits in (self.layers, self.projection, self.heads, *self.kept.values()):
            if bits not in PRECISIONS:
                raise UsageError(f"weights of {bits} bits", hint=f"one of {', '.join(map(str, PRECISIONS))}")
        for block in (self.block, self.projection_block):
            if block is not None and block not in BLOCKS:
                raise UsageError(f"blocks of {block} inputs", hint=f"one of {', '.join(map(str, BLOCKS))}")

    def bits(self, matmul: CpuMatmul) -> int:
        """Return the bits of one matmul."""
        if matmul.is_projection:
            return self.projection
        return self.heads if matmul.of_heads else self.kept.get(matmul.name, self.layers)

    def block_of(self, matmul: CpuMatmul) -> int | None:
        """Return how many inputs of one matmul share a scale; None if no allowed block divides them: it stays as it is."""
        if matmul.is_projection:
            return largest_block(self.projection_block, matmul.shape[1])
        if self.block is not None:
            return self.block if matmul.shape[1] % self.block == 0 else None
        return largest_block(DEFAULT_BLOCKS.get(self.bits(matmul), max(DEFAULT_BLOCKS.values())), matmul.shape[1])


@dataclass(frozen=True, slots=True)
class CpuReport:
    """Reports a quantised graph: ``bits`` of each matmul, weights' bytes ``before`` and ``after``.

    ``integers``: names matmuls in integers (:mod:`.cpu_w8a8`). ``smoothed``: counts activations. ``plain``: bytes of the weights
    that a plain step reads afterwards.
    """

    bits: Mapping[str, int]
    integers: Sequence[str]
    smoothed: int
    before: int
    after: int
    plain: int


Advance = Callable[[int, str], object]
Made = dict[tuple[str, int, int], tuple[Grid, np.ndarray]]
"""Grids and codes by matmul, bits and block: several graphs share them, and each is rounded once."""


def quantise_cpu(
    model: ir.Model,
    precision: CpuPrecision,
    scales: Scales | None = None,
    moments: Mapping[str, Moments] | None = None,
    made: Made | None = None,
    advance: Advance = lambda _done, _name: None,
) -> CpuReport:
    """Rewrite the matmuls of a CPU graph, in place.

    ``scales``: smooth the activations of quantised matmuls first, and compute those that suit in integers, unless ``precision``
    names a block. ``moments``: E[xᵀx] of a weight's activation before smoothing, by the weight's name (:data:`.blocks.Moments`).
    GPTQ rounds a weight with moments to 4 bits; all others are rounded to the nearest. They are asked for in the order of the
    layers. ``made`` keeps codes from call to call with the same scales and moments. ``advance(done, name)`` is called before
    each matmul.

    Raises:
        QuantisationError: a weight holds NaN or infinity, there is nothing to quantise, or heads of 8 bits are to have 4.
    """
    graph = model.graph
    if precision.heads == 4 and any(node.op_type == "MatMulNBits" for node in ir.traversal.RecursiveGraphIterator(graph)):
        raise QuantisationError("the heads of this CPU graph have 8 bits already", hint="leave --heads-bits out")
    matmuls = find_matmuls(model)
    blocks = {each: precision.block_of(each) for each in matmuls}
    bits = {each: 32 if blocks[each] is None else precision.bits(each) for each in matmuls}
    read = {matmul.activation for matmul in matmuls if bits[matmul] < 32}
    if not read:
        raise QuantisationError(
            "no matrix product of the CPU graph was quantised",
            hint=f"their inputs have to be multiples of {precision.block or min(BLOCKS)}: "
            + ("leave --block out" if precision.block else "they stay in fp32"),
        )
    chosen: dict[ir.Value, Suited] = {}
    smoothed: list[ir.Value] = []
    if scales is not None:
        if precision.block is None:
            chosen = suited(_may_be_integers(matmuls, bits, precision), scales)
        smoothed = smooth(graph, matmuls, scales, read, {value: each.smoothing for value, each in chosen.items()})
    integers = IntegerProducts(graph, chosen, smoothed)
    in_integers = [matmul.name for matmul, wanted in bits.items() if wanted == 8 and matmul in integers]
    before, after = 0, 0
    for done, matmul in enumerate(matmuls):
        advance(done, matmul.name)
        wanted, block = bits[matmul], blocks[matmul]
        before += (size := 4 * math.prod(matmul.shape))
        if wanted == 32 or block is None:
            take_in(graph, matmul)
            after += size
            continue
        if matmul in integers:
            integers.take_factors(matmul)
            block = matmul.shape[1]
        key = (matmul.name, wanted, block)
        found = made.get(key) if made is not None else None
        if found is None:
            of_input = None if moments is None or wanted != 4 else moments.get(str(matmul.weights[0].name))
            found = rounded(matmul, wanted, block, of_input)
        if made is not None:
            made[key] = found
        if matmul in integers:
            node, size = integers.make(matmul, *found)
        else:
            node, size = few_bits(graph, matmul, *found, str(matmul.node.name))
        _put(graph, matmul, node, precision.rescored)
        after += size
    passes.RemoveUnusedNodesPass()(model)
    by_name = {matmul.name: wanted for matmul, wanted in bits.items()}
    return CpuReport(by_name, in_integers, len(smoothed), before, after, plain_step_bytes(model))


def _may_be_integers(matmuls: Sequence[CpuMatmul], bits: Mapping[CpuMatmul, int], precision: CpuPrecision) -> list[CpuMatmul]:
    """List products of layers whose activations only products in 8 bits read, and the projection if logits are rescored.

    A projection that heads share stays in blocks, as theirs does: then both are stored once.
    """
    others = {matmul.activation for matmul in matmuls if bits[matmul] != 8}
    of_heads = {place for matmul in matmuls if matmul.of_heads for place in matmul.places}
    found = [each for each in matmuls if each.activation not in others]
    layers = [each for each in found if each.layer is not None]
    return layers + [each for each in found if each.is_projection and precision.rescored and not of_heads & each.places]


def largest_block(block: int, inputs: int) -> int | None:
    """Return the largest block, up to ``block``, that divides ``inputs``; None if none does."""
    return max((each for each in BLOCKS if each <= block and inputs % each == 0), default=None)


def few_bits_size(shape: tuple[int, int], bits: int, block: int) -> int:
    """Count the bytes of a symmetric matrix [N, K] in few bits: codes, and a float32 scale a block."""
    return math.prod(shape) * bits // 8 + math.prod(shape) // block * 4


def rounded(matmul: CpuMatmul, bits: int, block: int, moments: Moments | None = None) -> tuple[Grid, np.ndarray]:
    """Round a matmul's weight to a grid and codes. ``moments``: see :func:`quantise_cpu`.

    Raises:
        QuantisationError: the weight holds NaN or infinity.
    """
    if bits != 4 or moments is None:
        return _rounded_alone(matmul, bits, block)
    matrix = matmul.matrix()
    _check_finite(matmul, matrix)
    grid = make_grid(matrix, bits, block)
    # Moments of x / s are those of x, divided by both factors.
    factors = np.broadcast_to(matmul.multipliers, (matmul.shape[1],))
    return grid, compensated(matrix, grid, rescaled(moments, factors))


def _rounded_alone(matmul: CpuMatmul, bits: int, block: int) -> tuple[Grid, np.ndarray]:
    """Round each value to the nearest, a few rows at a time: the search for scales takes several times their memory."""
    outputs, size = matmul.shape
    codes, grids, at = np.empty((outputs, size // block, block), np.uint8), [], 0
    for piece in matmul.pieces():
        _check_finite(matmul, piece)
        grids.append(make_grid(piece, bits, block))
        codes[at : at + len(piece)] = nearest(piece, grids[-1])
        at += len(piece)
    scales, zeros = (np.concatenate([getattr(grid, name) for grid in grids]) for name in ("scales", "zero_points"))
    return Grid(bits, scales, zeros), codes


def _check_finite(matmul: CpuMatmul, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise QuantisationError(f"the weight of {matmul.name} holds NaN or infinity", hint="the checkpoint's weights are broken")


def put_bits(graph: ir.Graph, matmul: CpuMatmul, grid: Grid, codes: np.ndarray) -> None:
    """Put MatMulNBits in a matmul's place."""
    _put(graph, matmul, few_bits(graph, matmul, grid, codes, str(matmul.node.name))[0])


def _put(graph: ir.Graph, matmul: CpuMatmul, made: ir.Node, rescored: int = 0) -> None:
    node = matmul.node
    old, result = node.outputs[0], made.outputs[0]
    result.type, result.shape = old.type, old.shape
    home = node.graph
    assert home is not None
    home.insert_before(node, [made])
    if matmul.is_projection and rescored and len(matmul.weights) == 1:
        result = rescore(graph, matmul, result, rescored)
        result.type, result.shape = old.type, old.shape
    take_place(result, node)


def few_bits(graph: ir.Graph, matmul: CpuMatmul, grid: Grid, codes: np.ndarray, name: str) -> tuple[ir.Node, int]:
    """Make a MatMulNBits in place of ``matmul``, in no graph yet. Returns it and the bytes of its weights."""
    stored = _stored(name, grid, codes)
    inputs = [matmul.activation, *(new_constant(graph, array, part) for part, array in stored.items())]
    outputs, size = matmul.shape
    attributes: dict[str, Any] = {"K": size, "N": outputs, "bits": grid.bits, "block_size": codes.shape[-1]}
    attributes["accuracy_level"] = _ROUND_ACTIVATIONS_TO_INT8
    made = new_node("MatMulNBits", inputs, attributes, name, domain=MICROSOFT)
    made.outputs[0].type, made.outputs[0].shape = matmul.node.outputs[0].type, matmul.node.outputs[0].shape
    return made, sum(array.nbytes for array in stored.values())


def _stored(name: str, grid: Grid, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Lay out the inputs of MatMulNBits behind the activation, by name, in its order."""
    parts = {"codes": packed(codes, grid.bits), "scales": grid.scales}
    if not grid.is_symmetric:
        parts["zero_points"] = packed(grid.zero_points, grid.bits)
    return {f"{name}/{part}": np.ascontiguousarray(values) for part, values in parts.items()}


def take_in(graph: ir.Graph, matmul: CpuMatmul) -> None:
    """Multiply the smoothing that a matmul was given into its weight, for a matmul that stays in float32."""
    if (matmul.multipliers == 1).all() and (matmul.divisors == 1).all():
        return
    smoothed = new_constant(graph, np.ascontiguousarray(matmul.matrix().T), f"{matmul.node.name}/smoothed")
    matmul.node.replace_input_with(1, smoothed)
