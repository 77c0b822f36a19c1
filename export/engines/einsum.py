"""Products with weights that are network inputs, in the form that an engine can run without rearranging a weight.

A linear layer is traced as ``MatMul(x, Transpose(weight))``. A builder turns the transposition of a constant into another
constant; that of an input would move the whole weight in every step. ``Einsum`` names the axes instead: TensorRT makes a plain
product of it, over the rows of all slots at once. Several layers of one ``x`` become one product and a split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

# By number of axes of x.
_EQUATIONS = {2: "nh,oh->no", 3: "bnh,oh->bno"}
Group = tuple[str, ...]
"""Names of weights whose rows lie one after another in one input."""


def rewrite_products(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], merge: bool) -> list[Group]:
    """Rewrite, in place, every product of the graph with a transposed weight [out, in] of ``weights``.

    Weights that are used nowhere else and multiply the same value are merged, if ``merge``. Returns these groups; the graph
    then uses :func:`merged_name` of each, which its caller must declare.
    """
    uses = Counter(name for node in graph.node for name in node.input)
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and list(helper.get_node_attr_value(node, "perm")) == [1, 0]
    }
    known = (*graph.value_info, *graph.input, *graph.output)
    axes = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
    products = [
        node
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in transposed and axes.get(node.input[0]) in _EQUATIONS
    ]
    together: dict[str, list[onnx.NodeProto]] = {}
    for product in products:
        own = uses[product.input[1]] == 1 and uses[transposed[product.input[1]]] == 1
        key = product.input[0] if merge and own else product.output[0]
        together.setdefault(key, []).append(product)
    groups = []
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for members in together.values():
        names = tuple(transposed[member.input[1]] for member in members)
        value, outputs = members[0].input[0], [member.output[0] for member in members]
        replaced.update({output: [] for output in outputs})
        if len(members) > 1:
            groups.append(names)
            rows = [int(weights[name].dims[0]) for name in names]
            replaced[outputs[0]] = _merged(graph, value, axes[value], rows, names, outputs)
        else:
            replaced[outputs[0]] = [_product(value, axes[value], names[0], outputs[0], members[0].name)]
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    used = {name for node in nodes for name in node.input}
    kept = [node for node in nodes if node.output[0] not in transposed or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)
    return groups


def merged_name(names: Sequence[str]) -> str:
    """``layers.0.q.weight`` and ``layers.0.k.weight`` make ``layers.0.q+k.weight``."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    before = next(at for at in range(shortest) if len({part[at] for part in parts}) > 1)
    after = next((at for at in range(shortest - before) if len({part[-1 - at] for part in parts}) > 1), 0)
    middle = "+".join(".".join(part[before : len(part) - after]) for part in parts)
    return ".".join([*parts[0][:before], middle, *parts[0][len(parts[0]) - after :]])


def _product(value: str, axes: int, weight: str, output: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Einsum", [value, weight], [output], name=name, equation=_EQUATIONS[axes])


def _merged(
    graph: onnx.GraphProto, value: str, axes: int, rows: list[int], names: Group, outputs: list[str]
) -> list[onnx.NodeProto]:
    name = merged_name(names)
    graph.initializer.append(helper.make_tensor(f"{name}/rows", onnx.TensorProto.INT64, [len(rows)], rows))
    product = _product(value, axes, name, f"{name}/product", f"{name}/Einsum")
    split = helper.make_node("Split", [f"{name}/product", f"{name}/rows"], outputs, name=f"{name}/Split", axis=-1)
    return [product, split]
