"""Merges operators of the CPU graph where ONNX Runtime has one operator for several; runs after :mod:`.fuse`.

A pass replaces exactly the pattern that it names and leaves everything else alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from ...runtime.executors import step_io
from ..trace.names import joined_names
from .matmuls import constant_matrix
from .patterns import MICROSOFT, elements, match_commutative, new_constant, new_node, producer_if, replace_uses

ATTENTION = "GroupQueryAttention"
_COS_CACHE, _SIN_CACHE, _POSITIONS = 7, 8, 9  # inputs of the attention
# Operators whose results depend on their inputs row by row, and on constants.
_ROW_BY_ROW = {"Unsqueeze", "Cast", "Mul", "Cos", "Sin"}


def merge(model: ir.Model) -> None:
    """Run all passes, in place, on the fused CPU graph."""
    clean = passes.RemoveUnusedNodesPass()
    for op, one in _PASSES:
        for node in list(model.graph):
            if node.op_type == op:
                one(model.graph, node)
        clean(model)  # the readers of a value decide what may be merged


# -- rotation inside the attention -----------------------------------------------------------------------------------


def _rotate_inside(graph: ir.Graph, attention: ir.Node) -> None:
    """Turn the rotation of queries and keys by the same angles into an attention that rotates by a table of positions.

    A tree's rows of one depth share a position, so each row's own position must count. The operator reads only the first
    position where all visible rows are the step's own (a first prompt); the margin before every cache rules that out.
    """
    query, key = (producer_if(value, "RotaryEmbedding") for value in attention.inputs[:2])
    past = attention.inputs[3]
    if query is None or key is None or past is None or past.shape is None:
        return
    rows, head_dim = past.shape[2:]
    cos, sin = query.inputs[1:3]
    whole_heads = all(len(node.inputs) == 3 and node.attributes["interleaved"].as_int() == 0 for node in (query, key))
    if not whole_heads or key.inputs[1] is not cos or key.inputs[2] is not sin or cos is None or sin is None:
        return
    if not isinstance(rows, int) or not isinstance(head_dim, int) or head_dim % 16:  # the operator takes no other heads
        return
    tables = [_table(graph, value, rows, head_dim // 2) for value in (cos, sin)]
    if None in tables:
        return
    positions = next(value for value in graph.inputs if value.name == step_io.POSITIONS)
    for index, value in ((0, query.inputs[0]), (1, key.inputs[0])):
        attention.replace_input_with(index, value)
    for index, value in zip((_COS_CACHE, _SIN_CACHE, _POSITIONS), (*tables, positions), strict=True):
        attention.replace_input_with(index, value)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _table(graph: ir.Graph, value: ir.Value, rows: int, width: int) -> ir.Value | None:
    """Evaluate ``value`` [B, N, D_h / 2] at positions 0 … rows − 1, as a constant [rows, D_h / 2]; made once a graph.

    A position is below the number of cache rows, because every row of a step lies in one. The graph's own nodes are evaluated,
    so the table has their scaling of the angles. Returns None if they don't make each row from its position alone.
    """
    name = f"{value.name}/table"
    if name in graph.initializers:
        return graph.initializers[name]
    try:
        part = ir.convenience.extract(graph, [step_io.POSITIONS], [value])
    except ValueError:  # it depends on another input
        return None
    if not {node.op_type for node in part} <= _ROW_BY_ROW:
        return None
    part.opset_imports.update(graph.opset_imports)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    results = evaluator.run(None, {step_io.POSITIONS: np.arange(rows)[None]})
    found = np.asarray(next(iter(results)))
    if found.shape != (1, rows, width) or found.dtype != np.float32:
        return None
    return new_constant(graph, found[0], name)


# -- one product for queries, keys and values ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Product:
    """``x`` times a constant matrix [in, out], stored ``transposed`` or not, plus a constant [out] if there is a bias.

    ``names``: the metadata of its node (:mod:`..trace.names`).
    """

    x: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    names: Mapping[str, str]


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    """Turn three products of one value, which only an attention reads, into one product: the operator takes them packed.

    ``<attention>/qkv/weight`` is a Concat of the stored matrices. The bundle's other graphs read the same matrices one by one,
    so no byte is stored twice. ONNX Runtime folds the Concat when it loads the graph and keeps no other copy.
    """
    products = [product_of(value) for value in attention.inputs[:3]]
    query, key, value = products
    if query is None or key is None or value is None:
        return
    alike = {(each.x, each.transposed, each.bias is None) for each in (query, key, value)}
    if len(alike) != 1:
        return
    name = f"{attention.name}/qkv"
    together = (query, key, value)
    nodes = joined(together, name)
    if query.bias is not None:
        product = nodes[-1].outputs[0]
        nodes.append(_concat([each.bias for each in together], 0, f"{name}/bias"))
        nodes.append(_named("Add", [product, nodes[-1].outputs[0]], {}, f"{name}/biased"))
    packed = nodes[-1].outputs[0]
    packed.type = query.x.type
    graph.insert_before(attention, nodes)
    for index, new in enumerate((packed, None, None)):
        attention.replace_input_with(index, new)


def joined(products: Sequence[Product], name: str) -> list[ir.Node]:
    """Make nodes that end with the product ``name`` of several matrices side by side, without biases; all are stored alike."""
    first = products[0]
    nodes = [_concat([each.weight for each in products], 0 if first.transposed else 1, f"{name}/weight")]
    if first.transposed:
        nodes.append(_named("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}, f"{name}/weight/transposed"))
    product = _named("MatMul", [first.x, nodes[-1].outputs[0]], {}, name)
    product.metadata_props.update(joined_names(each.names for each in products))
    return [*nodes, product]


def product_of(value: ir.Value | None, readers: int = 1) -> Product | None:
    """Return the product that makes ``value``, if its matrix is constant and ``value`` has so many ``readers``."""
    bias, product = match_commutative(producer_if(value, "Add"), "MatMul")
    if product is None:
        product = producer_if(value, "MatMul")
    elif bias is None or bias.const_value is None:
        return None
    if value is None or product is None or product.inputs[0] is None:
        return None
    if len(value.uses()) != readers or len(product.outputs[0].uses()) != (readers if bias is None else 1):
        return None
    matrix = constant_matrix(product)
    if matrix is None or len(matrix.parts) != 1 or matrix.parts[0].shape is None:
        return None
    (weight,) = matrix.parts
    # Where weights are linked, they are stored as the checkpoint has them: transposed.
    if bias is not None and bias.shape != (weight.shape[0 if matrix.transposed else 1],):  # type: ignore[index]
        return None
    return Product(product.inputs[0], weight, matrix.transposed, bias, product.metadata_props)


def _concat(values: list[ir.Value | None], axis: int, name: str) -> ir.Node:
    node = _named("Concat", values, {"axis": axis}, name)
    node.outputs[0].type = None if values[0] is None else values[0].type
    return node


def _named(op: str, inputs: list[ir.Value | None], attributes: dict[str, object], name: str) -> ir.Node:
    """Make a node of one output, both of the same name."""
    node = ir.node(op, inputs, attributes, name=name)  # type: ignore[arg-type]
    node.outputs[0].name = name
    return node


# -- sums and their norms --------------------------------------------------------------------------------------------


def _norm_of_sum(graph: ir.Graph, norm: ir.Node) -> None:
    """Turn the norm of a sum of two values [B, N, H] into SkipSimplifiedLayerNormalization, which makes the sum as well."""
    total = producer_if(norm.inputs[0], "Add")
    if total is None or norm.attributes["axis"].as_int() != -1:
        return
    shapes = [None if value is None else value.shape for value in total.inputs]
    if shapes[0] is None or len(shapes[0]) != 3 or shapes[0] != shapes[1]:  # the operator broadcasts in another way
        return
    name = f"{norm.name}/skip"
    attributes = ir.convenience.convert_attributes({"epsilon": norm.attributes["epsilon"].as_float()})
    normal, _mean, _deviation, summed = outputs = [ir.Value(name=each) for each in (f"{name}/norm", "", "", f"{name}/sum")]
    inputs = [*total.inputs, norm.inputs[1]]
    both = ir.Node(MICROSOFT, "SkipSimplifiedLayerNormalization", inputs, attributes, outputs=outputs, name=name)
    normal.shape = summed.shape = shapes[0]
    graph.insert_before(norm, [both])
    replace_uses(normal, norm.outputs[0])
    replace_uses(summed, total.outputs[0])


# -- rows of a matrix ------------------------------------------------------------------------------------------------


def _gather_rows(graph: ir.Graph, gather: ir.Node) -> None:
    """Turn a traced gather of whole rows of [B, N, H], with an index for each element, into GatherND."""
    data, spread = gather.inputs[0], producer_if(gather.inputs[1], "Expand")
    raised = None if spread is None else producer_if(spread.inputs[0], "Unsqueeze")
    if data is None or data.shape is None or raised is None or spread is None:
        return
    shape, axis = elements(spread.inputs[1]), elements(raised.inputs[1])
    if gather.attributes["axis"].as_int() != 1 or shape != [1, 1, data.shape[-1]] or axis not in ([2], [-1]):
        return
    rows = new_node("GatherND", [data, raised.outputs[0]], {"batch_dims": 1}, gather.outputs[0].name)
    rows.outputs[0].shape = gather.outputs[0].shape
    graph.insert_before(gather, [rows])
    replace_uses(rows.outputs[0], gather.outputs[0])


def _look_up(graph: ir.Graph, gather: ir.Node) -> None:
    """Turn a look-up of elements of a vector, by indices of one number each, into a plain Gather."""
    table, raised = gather.inputs[0], producer_if(gather.inputs[1], "Unsqueeze")
    if table is None or table.shape is None or len(table.shape) != 1 or raised is None or elements(raised.inputs[1]) != [-1]:
        return
    found = new_node("Gather", [table, raised.inputs[0]], {"axis": 0}, gather.outputs[0].name)
    found.outputs[0].shape = gather.outputs[0].shape
    graph.insert_before(gather, [found])
    replace_uses(found.outputs[0], gather.outputs[0])


_PASSES = (
    ("SimplifiedLayerNormalization", _norm_of_sum),
    (ATTENTION, _rotate_inside),
    (ATTENTION, _pack),
    ("GatherElements", _gather_rows),
    ("GatherND", _look_up),
)
