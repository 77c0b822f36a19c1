"""Fewer, larger operators for ONNX Runtime on a CPU, whose own fusions miss these patterns in a traced graph.

A step of one row runs some forty tiny operators a layer: what each costs to start is what is saved here. A pass replaces exactly
the pattern that it names and leaves everything else alone, so a graph that looks different stays right, if slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

_SWAP = [0, 2, 1, 3]


def fuse(model: ir.Model) -> None:
    """All passes, in place, on the lowered CPU graph."""
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
    """``weight · (x · 1/sqrt(mean(x²) + ε))`` over the last axis, in float32, to SimplifiedLayerNormalization."""
    weight, inner = _either(scaled, "Mul")
    x, reciprocal = _either(inner, "Reciprocal")
    root = None if reciprocal is None else _from(reciprocal.inputs[0], "Sqrt")
    epsilon, mean = _either(None if root is None else _from(root.inputs[0], "Add"), "ReduceMean")
    square = None if mean is None else _from(mean.inputs[0], "Pow")
    if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT or square is None or mean is None:
        return
    small = _constant(epsilon)
    if square.inputs[0] is not x or _constant(square.inputs[1]) != [2] or _constant(mean.inputs[1]) != [-1] or small is None:
        return
    attributes = {"axis": -1, "epsilon": small[0], "stash_type": 1}
    norm = _node("SimplifiedLayerNormalization", [x, weight], attributes, scaled.outputs[0].name)
    norm.outputs[0].shape = scaled.outputs[0].shape
    graph.insert_before(scaled, [norm])
    _retire(graph, scaled, norm.outputs[0])


def _rotary(graph: ir.Graph, rotated: ir.Node) -> None:
    """``x · cos + [-x₂, x₁] · sin``, both halves of cos and of sin alike, to RotaryEmbedding.

    ``x`` [B, H, N, D_h] is rows [B, N, H·D_h] split into heads: the operator takes those, and what it makes is split again, which
    :func:`_unsplit` takes back together with the attention's own reshaping.
    """
    direct, crossed = (_from(value, "Mul") for value in rotated.inputs[:2])
    if direct is None or crossed is None:
        return
    cos, turned = direct.inputs[1], _from(crossed.inputs[0], "Concat")
    x = direct.inputs[0]
    swapped = _from(x, "Transpose")
    split = None if swapped is None else _from(swapped.inputs[0], "Reshape")
    if turned is None or split is None or swapped is None or x is None or not _are_turned_halves(turned, x):
        return
    halves = [_half(graph, value) for value in (cos, crossed.inputs[1])]
    heads = None if x.shape is None else x.shape[1]
    if None in halves or not isinstance(heads, int):
        return
    rows = split.inputs[0]
    embed = _node("RotaryEmbedding", [rows, *halves], {"interleaved": 0, "num_heads": heads}, rotated.outputs[0].name)
    zeros = split.attributes.get("allowzero")
    allow = {"allowzero": 0 if zeros is None else zeros.as_int()}
    again = _node("Reshape", [embed.outputs[0], split.inputs[1]], allow, f"{rotated.outputs[0].name}/split")
    back = _node("Transpose", [again.outputs[0]], {"perm": _SWAP}, f"{rotated.outputs[0].name}/heads")
    embed.outputs[0].shape, embed.outputs[0].type = (None, None) if rows is None else (rows.shape, rows.type)
    graph.insert_before(rotated, [embed, again, back])
    _retire(graph, rotated, back.outputs[0])


def _are_turned_halves(turned: ir.Node, x: ir.Value) -> bool:
    """Whether ``turned`` is the upper half of the last axis of ``x``, negated, then the lower one."""
    negated, low = _from(turned.inputs[0], "Neg"), _from(turned.inputs[1], "Slice")
    high = None if negated is None else _from(negated.inputs[0], "Slice")
    width = None if x.shape is None else x.shape[-1]
    if len(turned.inputs) != 2 or low is None or high is None or not isinstance(width, int):
        return False
    if low.inputs[0] is not x or high.inputs[0] is not x or len(low.inputs) != 5 or len(high.inputs) != 5:
        return False
    (start, middle, axis, step), (other, end, *same) = ([_constant(value) for value in node.inputs[1:]] for node in (low, high))
    return (
        start == [0]
        and middle == other == [width // 2]
        and end is not None
        and end[0] >= width
        and (axis in ([3], [-1]) and step == [1] and same == [axis, step])
    )


def _half(graph: ir.Graph, tensor: ir.Value | None) -> ir.Value | None:
    """``f(a)`` [B, N, D_h / 2] where ``tensor`` is ``f(concat(a, a))`` [B, 1, N, D_h] and f is cos or sin; made once a graph."""
    spread = _from(tensor, "Unsqueeze")
    whole = None if spread is None else spread.inputs[0]
    function = _from(whole, "Cos") or _from(whole, "Sin")
    twice = None if function is None else _from(function.inputs[0], "Concat")
    if function is None or twice is None or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1]:
        return None
    assert twice.inputs[0] is not None
    half = next((use.node for use in twice.inputs[0].uses() if use.node.op_type == function.op_type), None)
    if half is None:
        half = _node(function.op_type, [twice.inputs[0]], {}, function.outputs[0].name)
        graph.insert_before(function, [half])
    return half.outputs[0]


def _unsplit(graph: ir.Graph, merge: ir.Node) -> None:
    """Rows [B, N, H·D_h] split into heads and merged again, one right after the other, are what they were."""
    swaps = [back := _from(merge.inputs[0], "Transpose"), None if back is None else _from(back.inputs[0], "Transpose")]
    if None in swaps or any(list(node.attributes["perm"].as_ints()) != _SWAP for node in swaps if node is not None):
        return
    split = None if swaps[1] is None else _from(swaps[1].inputs[0], "Reshape")
    rows = None if split is None else split.inputs[0]
    width = None if rows is None or rows.shape is None or len(rows.shape) != 3 else rows.shape[-1]
    if rows is not None and isinstance(width, int) and _merged_width(merge) == width:
        _retire(graph, merge, rows)


def _merged_width(merge: ir.Node) -> int | None:
    """Size of the last of three axes that a Reshape makes."""
    target, shape = _constant(merge.inputs[1]), merge.outputs[0].shape
    if target is not None:
        return int(target[2]) if len(target) == 3 and target[:2] == [0, 0] else None
    width = None if shape is None or len(shape) != 3 else shape[-1]
    return width if isinstance(width, int) else None


def _from(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of kind ``op`` that makes ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def _either(node: ir.Node | None, op: str) -> tuple[ir.Value | None, ir.Node | None]:
    """Of a node with two inputs: the one that no ``op`` makes, and the ``op`` that makes the other."""
    if node is not None:
        for this, other in (node.inputs[:2], node.inputs[1::-1]):
            made = _from(other, op)
            if made is not None:
                return this, made
    return None, None


def _constant(value: ir.Value | None) -> list[float] | None:
    """The elements of a small constant."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size > 8 else [float(x) for x in tensor.numpy().ravel()]


def _node(op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, object], name: str | None) -> ir.Node:
    """A node of one output, named after the value that it stands for: values have names, nodes need not."""
    node = ir.Node("", op, inputs, ir.convenience.convert_attributes(attributes), name=f"{name}/{op}")  # type: ignore[arg-type]
    node.outputs[0].name = f"{node.name}_output"
    return node


def _retire(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` stand for the output of ``node``; what nobody reads any more is removed at the end."""
    old = node.outputs[0]
    assert not old.is_graph_output()
    value.type = old.type if value.type is None else value.type
    ir.convenience.replace_all_uses_with(old, value)
