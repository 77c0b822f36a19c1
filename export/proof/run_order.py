"""How ONNX Runtime runs a graph as it is, and with it how many bytes of weights are in memory at a time.

Its CPU provider transposes an fp16 weight and makes an fp32 copy of that to multiply with: three times the weight beside the
weight itself, and another copy in the branch of an If. So products with big weights are cut into pieces. The copies live from
their conversion to their product. It orders nodes depth first, back from those that nothing uses, and a product's weight before
its other operand: from the last product on, so that the copies of all layers are made before the first product runs. So
products are made ends of the graph, which are reached one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import helper

_PRODUCTS = ("MatMul", "Gemm")
_PREFIX = "run_order."
_PIECE_BYTES = 8 << 20


def run_products_in_turn(path: Path, piece_bytes: int = _PIECE_BYTES) -> int:
    """Rewrite the file of a graph so that its weights are converted one by one, in pieces; those that lie outside stay there.

    A product with a transposed weight outside of more than ``piece_bytes`` becomes products with some rows of it each, whose
    results are joined: the same sums. Every product outside of branches gets an ``Identity`` that nothing uses. These stand
    before all other nodes, in the products' order: the file is for ONNX Runtime alone, which sorts nodes itself (those of
    branches it wants sorted). Returns how many products there are.
    """
    model = onnx.load(path, load_external_data=False)
    _Pieces(model.graph, piece_bytes).cut(model.graph, {})
    _drop_unused_transposes(model.graph)
    count = _make_ends(model.graph)
    onnx.save(model, path)
    return count


class _Pieces:
    """Cuts products with big transposed weights. ``graph``: the outermost, which declares the weights and their pieces."""

    def __init__(self, graph: onnx.GraphProto, piece_bytes: int) -> None:
        self._graph = graph
        self._limit = piece_bytes
        self._weights = {
            tensor.name: tensor
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL and len(tensor.dims) == 2 and _nbytes(tensor) > piece_bytes
        }
        self._pieces: dict[str, list[str]] = {}

    def cut(self, graph: onnx.GraphProto, outer: dict[str, str]) -> None:
        """Rewrite ``graph`` and those inside it. ``outer``: weights by the transposed value's name, of the graphs around."""
        transposed = dict(outer)
        for node in graph.node:
            if node.op_type == "Transpose" and node.input[0] in self._weights:
                transposed[node.output[0]] = node.input[0]
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for inner in _inner(node):
                self.cut(inner, transposed)
            weight = transposed.get(node.input[1]) if node.op_type == "MatMul" else None
            nodes.extend([node] if weight is None else self._products(node, self._cut_weight(weight)))
        del graph.node[:]
        graph.node.extend(nodes)

    def _products(self, product: onnx.NodeProto, pieces: list[str]) -> Iterator[onnx.NodeProto]:
        value, output = product.input[0], product.output[0]
        parts = [f"{output}/{number}" for number in range(len(pieces))]
        for part, piece in zip(parts, pieces, strict=True):
            yield helper.make_node("Transpose", [piece], [f"{part}/weight"], name=f"{part}/weight", perm=[1, 0])
            yield helper.make_node("MatMul", [value, f"{part}/weight"], [part], name=part)
        yield helper.make_node("Concat", parts, [output], name=product.name, axis=-1)

    def _cut_weight(self, name: str) -> list[str]:
        """Declare the pieces of a weight [out, in], whose rows lie one after another."""
        if name not in self._pieces:
            tensor = self._weights[name]
            place = {entry.key: entry.value for entry in tensor.external_data}
            rows, width = tensor.dims
            row_bytes = _nbytes(tensor) // rows
            step = max(1, self._limit // row_bytes)
            self._pieces[name] = []
            for first in range(0, rows, step):
                count = min(step, rows - first)
                piece = onnx.TensorProto(name=f"{name}/{first}", data_type=tensor.data_type, dims=[count, width])
                piece.data_location = onnx.TensorProto.EXTERNAL
                offset = int(place.get("offset", 0)) + first * row_bytes
                for key, text in (("location", place["location"]), ("offset", offset), ("length", count * row_bytes)):
                    piece.external_data.add(key=key, value=str(text))
                self._graph.initializer.append(piece)
                self._pieces[name].append(piece.name)
        return self._pieces[name]


def _nbytes(tensor: onnx.TensorProto) -> int:
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _inner(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all that are inside it."""
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from _graphs(inner)


def _drop_unused_transposes(graph: onnx.GraphProto) -> None:
    """Those whose products were cut: ONNX Runtime would run them."""
    used = {name for each in _graphs(graph) for node in each.node for name in node.input}
    used |= {value.name for each in _graphs(graph) for value in each.output}
    for each in list(_graphs(graph)):
        for node in [node for node in each.node if node.op_type == "Transpose" and node.output[0] not in used]:
            each.node.remove(node)


def _make_ends(graph: onnx.GraphProto) -> int:
    nodes = list(graph.node)
    products = [node.output[0] for node in nodes if node.op_type in _PRODUCTS]
    ends = [helper.make_node("Identity", [value], [_PREFIX + value], name=_PREFIX + value) for value in products]
    del graph.node[:]
    graph.node.extend(ends + nodes)
    return len(products)
