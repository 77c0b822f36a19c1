"""Rewrites a graph so that ONNX Runtime holds few bytes of weights at a time when it runs the graph without optimising it.

A float32 weight is multiplied where it lies: ``FusedMatMul`` reads it as it is stored, and no copy is made. Of an fp16 weight the
CPU provider makes a transposed copy, and an fp32 copy of that to multiply with: three times the weight beside the weight itself,
and another copy in the branch of an If. So matrix products with big fp16 weights are cut into pieces.
The copies live from their conversion to their product. ONNX Runtime orders nodes depth first, back from those that nothing uses,
and a product's weight before its other operand: from the last product on, so that the copies of all layers are made before the
first product runs. So products are made ends of the graph, which are reached one by one.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ..passes.matmuls import MATMULS, constant_matrix
from ..passes.patterns import MICROSOFT, replace_uses

_PREFIX = "run_order."
_PIECE_BYTES = 8 << 20


def run_matmuls_in_turn(path: Path, piece_bytes: int = _PIECE_BYTES) -> int:
    """Rewrite the file of a graph so that its weights are converted one by one, in pieces; weights outside the file stay there.

    A product with a transposed float32 weight becomes one operator. A product with a transposed float16 weight outside of more
    than ``piece_bytes`` becomes products with some rows of it each, whose results are joined: the same sums. Every product
    outside of branches gets an ``Identity`` that nothing uses. These stand before all other nodes, in the products' order: the
    file is for ONNX Runtime alone, which sorts nodes itself (it wants those
    of branches sorted). Returns the number of products.
    """
    model = ir.load(path)
    pieces: dict[ir.Value, list[ir.Value]] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        matrix = constant_matrix(node)
        if node.op_type != "MatMul" or matrix is None or matrix.turn is None or len(matrix.parts) != 1:
            continue
        (weight,) = matrix.parts
        tensor = weight.const_value
        if weight.dtype == ir.DataType.FLOAT:
            _multiply_in_place(node, matrix.turn, weight)
            model.opset_imports[MICROSOFT] = 1
        elif isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > piece_bytes:
            if weight not in pieces:
                pieces[weight] = _cut(model.graph, weight, tensor, piece_bytes)
            _multiply_in_pieces(node, matrix.turn, pieces[weight])
    count = _make_ends(model.graph)
    ir.save(model, path)
    return count


def _cut(graph: ir.Graph, weight: ir.Value, tensor: ir.ExternalTensor, piece_bytes: int) -> list[ir.Value]:
    """Declare the pieces of a weight [out, in], whose rows lie one after another."""
    rows, width = tensor.shape.numpy()
    row_bytes = tensor.nbytes // rows
    step = max(1, piece_bytes // row_bytes)
    pieces = []
    for first in range(0, rows, step):
        count = min(step, rows - first)
        name, shape = f"{weight.name}/{first}", ir.Shape([count, width])
        offset, length = (tensor.offset or 0) + first * row_bytes, count * row_bytes
        part = ir.ExternalTensor(
            tensor.location, offset, length, tensor.dtype, shape=shape, name=name, base_dir=tensor.base_dir
        )
        pieces.append(ir.Value(name=name, type=weight.type, shape=shape, const_value=part))
        graph.register_initializer(pieces[-1])
    return pieces


def _multiply_in_place(matmul: ir.Node, turn: ir.Node, weight: ir.Value) -> None:
    """Put one operator, which reads the weight as it is stored, in the place of a product and its Transpose."""
    fused = ir.node("FusedMatMul", [matmul.inputs[0], weight], {"transB": 1}, domain=MICROSOFT, name=matmul.name)
    _replace(matmul, turn, [fused])


def _multiply_in_pieces(matmul: ir.Node, turn: ir.Node, pieces: list[ir.Value]) -> None:
    """Put a product with each piece, and a Concat, in the place of one product."""
    output = matmul.outputs[0]
    nodes, parts = [], []
    for number, piece in enumerate(pieces):
        name = f"{output.name}/{number}"
        nodes.append(ir.node("Transpose", [piece], {"perm": [1, 0]}, name=f"{name}/weight"))
        nodes.append(ir.node("MatMul", [matmul.inputs[0], nodes[-1].outputs[0]], name=name))
        parts.append(nodes[-1].outputs[0])
        for node in nodes[-2:]:
            node.outputs[0].name = str(node.name)
    nodes.append(ir.node("Concat", parts, {"axis": -1}, name=matmul.name))
    _replace(matmul, turn, nodes)


def _replace(matmul: ir.Node, turn: ir.Node, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of a product; the last one takes its name. A Transpose that nothing reads any more goes, too."""
    graph, output, whole = matmul.graph, matmul.outputs[0], nodes[-1].outputs[0]
    assert graph is not None
    result = output.name
    whole.shape, whole.type = output.shape, output.type
    graph.insert_before(matmul, nodes)
    replace_uses(whole, output)
    output.name, whole.name = f"{result}/before", result
    graph.remove(matmul, safe=True)
    if turn.graph is not None and not turn.outputs[0].uses():  # ONNX Runtime would run it
        turn.graph.remove(turn, safe=True)


def _make_ends(graph: ir.Graph) -> int:
    values = [node.outputs[0] for node in graph if node.op_type in MATMULS]
    ends = [ir.node("Identity", [value], name=f"{_PREFIX}{value.name}") for value in values]
    for end in ends:
        end.outputs[0].name = end.name
    if ends:
        graph.insert_before(graph[0], ends)
    return len(ends)
