"""The order in which ONNX Runtime runs a graph as it is, and with it how many weights are in memory at a time.

Its CPU provider multiplies fp16 weights as fp32 copies that live from their conversion to their product. It orders nodes
depth first, back from those that nothing uses, and a product's weight before its other operand: from the last product on,
so that the copies of all layers are made before the first product runs.
"""

from __future__ import annotations

from pathlib import Path

import onnx

_PRODUCTS = ("MatMul", "Gemm")
_PREFIX = "run_order."


def run_products_in_turn(path: Path) -> int:
    """Make the products of a graph ends of it, which ONNX Runtime reaches one by one; weights that lie outside stay there.

    Each gets an ``Identity`` that nothing uses, so no result changes. They stand before all other nodes, in the products'
    order: the file is for ONNX Runtime alone, which sorts nodes itself. Returns how many products there are.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    products = [node.output[0] for node in nodes if node.op_type in _PRODUCTS]
    ends = [onnx.helper.make_node("Identity", [value], [_PREFIX + value], name=_PREFIX + value) for value in products]
    del model.graph.node[:]
    model.graph.node.extend(ends + nodes)
    onnx.save(model, path)
    return len(products)
