"""Fuses operators for ONNX Runtime on a CPU, whose own fusions miss these patterns in a traced graph.

A step of one row runs some forty tiny operators a layer, and each costs time to start. A pass replaces exactly the pattern that
it names and leaves everything else alone: a graph that looks different stays right, if slower.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from .patterns import elements, match_commutative, new_node, producer_if, replace_uses

_SWAP = [0, 2, 1, 3]


def fuse(model: ir.Model) -> None:
    """Run all passes, in place, on the lowered CPU graph."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Mul":
            _norm(graph, node)
    for node in list(graph):
        if node.op_type == "Add":
            _rotary(graph, node)
    for node in list(graph):
        if node.op_type == "Reshape":
            _unsplit(graph, node)
    passes.RemoveUnusedNodesPass()(model)


def _norm(graph: ir.Graph, scaled: ir.Node) -> None:
    """Turn ``weight · (x · 1/sqrt(mean(x²) + ε))`` over the last axis, in float32, into SimplifiedLayerNormalization."""
    weight, inner = match_commutative(scaled, "Mul")
    x, reciprocal = match_commutative(inner, "Reciprocal")
    root = None if reciprocal is None else producer_if(reciprocal.inputs[0], "Sqrt")
    epsilon, mean = match_commutative(None if root is None else producer_if(root.inputs[0], "Add"), "ReduceMean")
    square = None if mean is None else producer_if(mean.inputs[0], "Pow")
    if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT or square is None or mean is None:
        return
    small = elements(epsilon)
    if square.inputs[0] is not x or elements(square.inputs[1]) != [2] or elements(mean.inputs[1]) != [-1] or small is None:
        return
    attributes = {"axis": -1, "epsilon": small[0], "stash_type": 1}
    norm = new_node("SimplifiedLayerNormalization", [x, weight], attributes, scaled.outputs[0].name)
    norm.outputs[0].shape = scaled.outputs[0].shape
    graph.insert_before(scaled, [norm])
    replace_uses(norm.outputs[0], scaled.outputs[0])


def _rotary(graph: ir.Graph, rotated: ir.Node) -> None:
    """Turn ``x · cos + [-x₂, x₁] · sin``, both halves of cos and of sin alike, into RotaryEmbedding.

    ``x`` [B, H, N, D_h] is rows [B, N, H·D_h] split into heads. The operator takes the rows, and its result is split again.
    :func:`_unsplit` removes that split together with the attention's own reshaping.
    """
    direct, crossed = (producer_if(value, "Mul") for value in rotated.inputs[:2])
    if direct is None or crossed is None:
        return
    cos, turned = direct.inputs[1], producer_if(crossed.inputs[0], "Concat")
    x = direct.inputs[0]
    swapped = _swap(x)
    split = None if swapped is None else producer_if(swapped.inputs[0], "Reshape")
    if turned is None or split is None or swapped is None or x is None or not _are_turned_halves(turned, x):
        return
    halves = [_half(graph, value) for value in (cos, crossed.inputs[1])]
    heads = None if x.shape is None else x.shape[1]
    if None in halves or not isinstance(heads, int):
        return
    rows = split.inputs[0]
    embed = new_node("RotaryEmbedding", [rows, *halves], {"interleaved": 0, "num_heads": heads}, rotated.outputs[0].name)
    zeros = split.attributes.get("allowzero")
    allow = {"allowzero": 0 if zeros is None else zeros.as_int()}
    again = new_node("Reshape", [embed.outputs[0], split.inputs[1]], allow, f"{rotated.outputs[0].name}/split")
    back = new_node("Transpose", [again.outputs[0]], {"perm": _SWAP}, f"{rotated.outputs[0].name}/heads")
    embed.outputs[0].shape, embed.outputs[0].type = (None, None) if rows is None else (rows.shape, rows.type)
    graph.insert_before(rotated, [embed, again, back])
    replace_uses(back.outputs[0], rotated.outputs[0])


def _are_turned_halves(turned: ir.Node, x: ir.Value) -> bool:
    """Tell if ``turned`` is the negated upper half of the last axis of ``x``, then the lower half."""
    negated, low = producer_if(turned.inputs[0], "Neg"), producer_if(turned.inputs[1], "Slice")
    high = None if negated is None else producer_if(negated.inputs[0], "Slice")
    width = None if x.shape is None else x.shape[-1]
    if len(turned.inputs) != 2 or low is None or high is None or not isinstance(width, int):
        return False
    if low.inputs[0] is not x or high.inputs[0] is not x or len(low.inputs) != 5 or len(high.inputs) != 5:
        return False
    (start, middle, axis, step), (other, end, *same) = ([elements(value) for value in node.inputs[1:]] for node in (low, high))
    return (
        start == [0]
        and middle == other == [width // 2]
        and end is not None
        and end[0] >= width
        and (axis in ([3], [-1]) and step == [1] and same == [axis, step])
    )


def _half(graph: ir.Graph, tensor: ir.Value | None) -> ir.Value | None:
    """Find or make ``f(a)`` [B, N, D_h / 2] for a ``tensor`` ``f(concat(a, a))`` [B, 1, N, D_h], where f is cos or sin."""
    spread = producer_if(tensor, "Unsqueeze")
    whole = None if spread is None else spread.inputs[0]
    function = producer_if(whole, "Cos") or producer_if(whole, "Sin")
    twice = None if function is None else producer_if(function.inputs[0], "Concat")
    angles = None if twice is None else twice.inputs[0]
    if function is None or twice is None or angles is None or len(twice.inputs) != 2 or twice.inputs[1] is not angles:
        return None
    half = next((use.node for use in angles.uses() if use.node.op_type == function.op_type), None)
    if half is None:
        half = new_node(function.op_type, [angles], {}, function.outputs[0].name)
        graph.insert_before(function, [half])
    return half.outputs[0]


def _unsplit(graph: ir.Graph, merge: ir.Node) -> None:
    """Remove a split of rows [B, N, H·D_h] into heads that is merged again at once."""
    back = _swap(merge.inputs[0])
    there = None if back is None else _swap(back.inputs[0])
    split = None if there is None else producer_if(there.inputs[0], "Reshape")
    rows = None if split is None else split.inputs[0]
    width = None if rows is None or rows.shape is None or len(rows.shape) != 3 else rows.shape[-1]
    if rows is not None and isinstance(width, int) and _merged_width(merge) == width:
        replace_uses(rows, merge.outputs[0])


def _swap(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes ``value``, if it swaps rows and heads."""
    node = producer_if(value, "Transpose")
    return node if node is not None and list(node.attributes["perm"].as_ints()) == _SWAP else None


def _merged_width(merge: ir.Node) -> int | None:
    """Return the size of the last of three axes that a Reshape makes."""
    target, shape = elements(merge.inputs[1]), merge.outputs[0].shape
    if target is not None:
        return int(target[2]) if len(target) == 3 and target[:2] == [0, 0] else None
    width = None if shape is None or len(shape) != 3 else shape[-1]
    return width if isinstance(width, int) else None
