"""Makes the exact greedy choice of a float32 projection and seldom reads more than a few of its rows.

Reading the vocabulary projection is a fifth of a plain step of a small model, and greedy decoding only needs its largest logit.
So logits are computed in 8 bits first. MatMulNBits rounds the hidden state h by at most half a step of each block, δh. With w the
weight of token v and q the same in 8 bits, Cauchy's inequality bounds the error of its logit::

    |w·h − q·(h + δh)| ≤ ‖q‖·‖δh‖ + ‖w − q‖·‖h‖

The tokens with the highest upper bounds get exact logits. If the largest of these is above all other bounds, it is the greedy
choice. If it isn't, or logits are wanted, the whole projection is computed after all.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.executors import step_io
from ..passes.matmuls import CpuMatmul, find_matmuls, place_of
from ..passes.patterns import MICROSOFT, Nodes, new_constant, replace_uses
from ..passes.rescore import exact_logits, greedy_choices, largest, likeliest
from ..weights import read_graph
from .blocks import Grid, values
from .cpu import few_bits, few_bits_size, rounded

_PREFIX = "screen"
_BITS = 8
_BLOCK = 32
_EXACT = 32  # tokens that get exact logits: with 16, one step of five rows in 17 was undecided, with 32 one in 110
_WORTH_IT = 1 << 20  # weights of a projection; reading a smaller one costs less than the nodes around it
_SLACK = 1.01  # covers what float32 rounds, also in the bounds


Rounded = dict[object, tuple[Grid, np.ndarray, np.ndarray, np.ndarray]]
"""By the place of a stored projection: its grid and codes, and both lengths of each row."""


def screen(model: ir.Model, known: Rounded | None = None) -> None:
    """Screen the projection of a CPU graph, in place. A small one, or one that isn't float32, stays as it is.

    ``known`` keeps what was computed, for further graphs with the same stored projection.
    The graph then reads ``logits_wanted``. If they aren't wanted, its logits are empty unless the choice needed them.

    Raises:
        QuantisationError: a weight holds NaN or infinity.
    """
    found = [matmul for matmul in find_matmuls(model) if matmul.is_projection]
    if not found or not screen_size(found[0].shape) or len(found[0].weights) != 1:
        return
    (projection,) = found
    graph, (greedy,) = model.graph, greedy_choices(projection)
    wanted = ir.Value(name=step_io.LOGITS_WANTED, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    graph.inputs.append(wanted)
    build = Nodes(graph, _PREFIX)
    rough, reach = _bounded(build, projection, {} if known is None else known)
    bounds, tokens = largest(build, build.add("Add", [rough, reach]), min(_EXACT, projection.shape[0]))
    exact = exact_logits(build, projection, tokens)
    token = likeliest(build, tokens, exact, greedy)
    # All tokens that were left out are bounded by the last one that wasn't.
    highest = build.add("ReduceMax", [exact, build.constant("last", [-1])], {"keepdims": 0})  # [B, R]
    others = build.add("Gather", [bounds, build.constant("lowest", -1)], {"axis": -1})
    least = build.add("ReduceMin", [build.add("Sub", [highest, others])], {"keepdims": 0})
    decided = build.add("Greater", [least, build.constant("zero", 0.0, np.float32)])
    whole = build.add("Or", [wanted, build.add("Not", [decided])])
    graph.insert_before(projection.node, build.nodes)
    _choose(graph, projection, greedy, token, whole)
    model.opset_imports[MICROSOFT] = 1
    passes.RemoveUnusedNodesPass()(model)


def screen_size(shape: tuple[int, int]) -> int:
    """Count the bytes that screening adds for a projection [V, H] of float32; 0 if it isn't screened."""
    if math.prod(shape) < _WORTH_IT or shape[1] % _BLOCK:
        return 0
    return few_bits_size(shape, _BITS, _BLOCK) + 2 * shape[0] * 4  # and both lengths of a row


def load_whole(path: Path) -> ir.Model:
    """Read a CPU graph and take :func:`screen` back, for callers that rewrite its projection."""
    model = read_graph(path)
    unscreen(model)
    return model


def unscreen(model: ir.Model) -> None:
    """Take :func:`screen` back, in place: every step computes the whole projection. Other graphs stay as they are."""
    graph = model.graph
    choice = next((node for node in graph if node.name == f"{_PREFIX}/If"), None)
    if choice is None:
        return
    whole, without = (choice.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    nodes, results = list(whole), list(whole.outputs)
    for branch in (whole, without):
        branch.outputs.clear()
    whole.remove(nodes)
    without.remove(list(without), safe=True)  # or what they read would count as used
    graph.insert_before(choice, nodes)
    for result, old in zip(results, choice.outputs, strict=True):
        replace_uses(result, old)
    graph.remove(choice, safe=True)
    passes.RemoveUnusedNodesPass()(model)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == step_io.LOGITS_WANTED))


def _bounded(build: Nodes, projection: CpuMatmul, known: Rounded) -> tuple[ir.Value, ir.Value]:
    """Compute logits in 8 bits and the largest error that each may have: both [B, R, V]."""
    graph, hidden = build.graph, projection.activation
    grid, codes, lengths, missed = _rounded(projection, known)
    matmul, _ = few_bits(graph, projection, grid, codes, _PREFIX)
    build.nodes.append(matmul)
    # A block of n values up to a rounds in steps of a / 127: what is lost of it has a length of at most √n · a / 254.
    half_step = _SLACK * math.sqrt(_BLOCK) / 254
    axis = build.constant("last", [-1])
    blocks = build.add("Reshape", [hidden, build.constant("blocks", [0, 0, -1, _BLOCK])])
    peaks = build.add("ReduceMax", [build.add("Abs", [blocks]), axis], {"keepdims": 0})  # [B, R, H / block]
    lost = build.add("ReduceL2", [peaks, axis], {"keepdims": 1})  # [B, R, 1]
    factors = np.stack([half_step * lengths, _SLACK * missed]).astype(np.float32)
    if not missed.any():  # weights that stood on such a grid from the beginning
        return matmul.outputs[0], build.add("Mul", [lost, new_constant(graph, factors[0], f"{_PREFIX}/factors")])
    sizes = build.add("Concat", [lost, build.add("ReduceL2", [hidden, axis], {"keepdims": 1})], {"axis": -1})
    return matmul.outputs[0], build.add("MatMul", [sizes, new_constant(graph, factors, f"{_PREFIX}/factors")])


def _rounded(projection: CpuMatmul, known: Rounded) -> tuple[Grid, np.ndarray, np.ndarray, np.ndarray]:
    """Round a projection to a grid and codes, and measure its rows, unless it is known by its place in a file."""
    tensor = projection.weights[0].const_value
    place = place_of(tensor) if isinstance(tensor, ir.ExternalTensor) else None
    if place is not None and place in known:
        return known[place]
    grid, codes = rounded(projection, _BITS, _BLOCK)
    result = (grid, codes, *_lengths(projection, grid, codes))
    if place is not None:
        known[place] = result
    return result


def _lengths(projection: CpuMatmul, grid: Grid, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute two lengths of each row [V]: ‖q‖ of the values of its codes, and ‖w − q‖."""
    lengths, missed = np.empty(len(codes)), np.empty(len(codes))
    start = 0
    for weight in projection.pieces():
        rows = slice(start, start + len(weight))
        near = values(codes[rows], Grid(grid.bits, grid.scales[rows], grid.zero_points[rows]))
        lengths[rows] = np.linalg.norm(near, axis=1)
        missed[rows] = np.linalg.norm(weight - near, axis=1)
        start += len(weight)
    return lengths, missed


def _choose(graph: ir.Graph, projection: CpuMatmul, greedy: ir.Value, token: ir.Value, whole: ir.Value) -> None:
    """Move the projection and its greedy choice into a branch that runs if ``whole`` is true."""
    logits, chooser = projection.node.outputs[0], greedy.producer()
    assert chooser is not None
    greedy.type = ir.TensorType(ir.DataType.INT64)
    nothing = Nodes(graph, f"{_PREFIX}/without")
    empty = nothing.add("ConstantOfShape", [nothing.constant("shape", [0, 0, 0])])
    same = nothing.add("Identity", [token])
    outputs = [ir.Value(name=f"{_PREFIX}/{value.name}", type=value.type, shape=value.shape) for value in (logits, greedy)]
    for made, old in zip((empty, same), outputs, strict=True):
        made.type = old.type
    choice = ir.Node("", "If", [whole], outputs=outputs, name=f"{_PREFIX}/If")
    graph.insert_before(projection.node, [choice])
    for new, old in zip(outputs, (logits, greedy), strict=True):
        for user, index in [(use.node, use.idx) for use in old.uses() if use.node is not chooser]:
            user.replace_input_with(index, new)
        if old.is_graph_output():
            new.name, old.name = old.name, f"{old.name}/whole"
            graph.outputs[graph.outputs.index(old)] = new
    nodes = [projection.node, chooser]
    graph.remove(nodes)
    choice.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], [logits, greedy], nodes=nodes, name="whole"))
    without = ir.Graph([], [empty, same], nodes=nothing.nodes, name="without")
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", without)
