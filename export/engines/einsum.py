"""Matrix products with weights that are network inputs, in the form that an engine can run without rearranging a weight.

A linear layer is traced as ``MatMul(x, Transpose(weight))``. A builder turns the transposition of a constant into another
constant. The transposition of an input would move the whole weight in every step. ``Einsum`` names the axes instead: TensorRT
makes a plain product of it, over the rows of all slots at once. Several layers of one ``x`` become one product and a split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from ..passes.matmuls import constant_matrix
from ..passes.patterns import new_constant, replace_uses

# By number of axes of x.
_EQUATIONS = {2: "nh,oh->no", 3: "bnh,oh->bno"}
Group = tuple[ir.Value, ...]
"""Weights whose rows lie one after another in one input."""


def rewrite_matmuls(graph: ir.Graph, weights: Collection[ir.Value], *, merge: bool) -> list[tuple[ir.Value, Group]]:
    """Rewrite, in place, every matrix product of the graph with a transposed weight [out, in] of ``weights``.

    Weights that are used nowhere else and multiply the same value are merged, if ``merge``. Returns the merged weights and the
    groups that they stand for: each is a new value [rows of all, in] that the caller must make an input.
    """
    together: dict[ir.Value, list[ir.Node]] = {}
    turned: dict[ir.Node, tuple[ir.Value, ir.Node]] = {}
    for node in graph:
        matrix = constant_matrix(node)
        x = node.inputs[0] if node.inputs else None
        if matrix is None or matrix.turn is None or len(matrix.parts) != 1 or x is None or x.shape is None:
            continue
        (weight,) = matrix.parts
        if node.op_type != "MatMul" or weight not in weights or len(x.shape) not in _EQUATIONS:
            continue
        turned[node] = weight, matrix.turn
        own = len(matrix.turn.outputs[0].uses()) == 1 and len(weight.uses()) == 1
        together.setdefault(x if merge and own else node.outputs[0], []).append(node)
    groups = []
    for members in together.values():
        names = tuple(turned[member][0] for member in members)
        if len(members) > 1:
            groups.append((_merge(graph, members, names), names))
        else:
            x, output = members[0].inputs[0], members[0].outputs[0]
            _replace(graph, members, [_einsum(x, names[0], str(members[0].name))], [output])
    for _weight, turn in turned.values():
        if turn.graph is graph and not turn.outputs[0].uses():
            graph.remove(turn, safe=True)
    return groups


def merged_name(names: Sequence[str]) -> str:
    """Join names: ``layers.0.q.weight`` and ``layers.0.k.weight`` make ``layers.0.q+k.weight``."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    before = next(at for at in range(shortest) if len({part[at] for part in parts}) > 1)
    after = next((at for at in range(shortest - before) if len({part[-1 - at] for part in parts}) > 1), 0)
    middle = "+".join(".".join(part[before : len(part) - after]) for part in parts)
    return ".".join([*parts[0][:before], middle, *parts[0][len(parts[0]) - after :]])


def _merge(graph: ir.Graph, members: Sequence[ir.Node], weights: Group) -> ir.Value:
    """Replace several products of one value by one with a merged weight, and a split. Returns the merged weight."""
    name = merged_name([str(weight.name) for weight in weights])
    shapes = [tuple(weight.shape.numpy()) for weight in weights if weight.shape is not None]
    rows = [shape[0] for shape in shapes]
    merged = ir.Value(name=name, type=weights[0].type, shape=ir.Shape([sum(rows), *shapes[0][1:]]))
    product = _einsum(members[0].inputs[0], merged, f"{name}/Einsum")
    product.outputs[0].name = f"{name}/product"
    sizes = new_constant(graph, np.array(rows, np.int64), f"{name}/rows")
    outputs = [ir.Value() for _ in members]
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, outputs=outputs, name=f"{name}/Split")
    _replace(graph, members, [product, split], [member.outputs[0] for member in members])
    return merged


def _einsum(x: ir.Value | None, weight: ir.Value, name: str) -> ir.Node:
    assert x is not None and x.shape is not None
    return ir.node("Einsum", [x, weight], {"equation": _EQUATIONS[len(x.shape)]}, name=name)


def _replace(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put ``new`` nodes where the first of the ``old`` ones stands; the last one's outputs become ``outputs``, name for name."""
    graph.insert_before(old[0], new)
    for value, before in zip(new[-1].outputs, outputs, strict=True):
        name = before.name
        value.shape = before.shape
        replace_uses(value, before)
        before.name, value.name = f"{name}/before", name
    for node in old:
        graph.remove(node, safe=True)
