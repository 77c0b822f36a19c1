"""Puts the heads of a CPU graph in 8 bits: a step then reads a quarter of their bytes.

Heads only guess, so their rounding changes no token. Blocks that read the same input become one product where one projection
reads them all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.files.heads import HeadConfig, expected_shapes
from ..passes.matmuls import find_matmuls
from ..passes.merge import Product, joined, product_of
from ..passes.patterns import MICROSOFT, Nodes, match_commutative, new_constant, producer_if, replace_uses
from .cpu import DEFAULT_BLOCKS, CpuPrecision, few_bits_size, largest_block, put_bits, rounded

_PRECISION = CpuPrecision()


def narrow_heads(model: ir.Model, *, shared: bool) -> None:
    """Rewrite, in place, the products that only heads need, in a CPU graph or in the heads' own graph.

    ``shared``: the heads' last product is the backbone's projection. It stays as it is: a step has it in memory anyway.
    """
    graph = model.graph
    for node in list(ir.traversal.RecursiveGraphIterator(graph)):
        if node.op_type == "Concat":
            _join_blocks(graph, node)
    passes.RemoveUnusedNodesPass()(model)
    products = [product for product in find_matmuls(model) if product.of_heads]
    for product in products[:-1] if shared else products:
        block = _PRECISION.block_of(product)
        if block is not None:
            put_bits(graph, product, *rounded(product, _PRECISION.heads, block))
            model.opset_imports[MICROSOFT] = 1
    passes.RemoveUnusedNodesPass()(model)


def narrow_size(config: HeadConfig) -> int:
    """Estimate the bytes that :func:`narrow_heads` writes, from the heads' config."""
    shapes = [shape for shape in expected_shapes(config, has_token_map=False).values() if len(shape) == 2]
    if config.projection == "pruned":
        shapes.append((config.draft_vocab_size, config.hidden_size))
    sizes = ((shape, largest_block(DEFAULT_BLOCKS[_PRECISION.heads], shape[1])) for shape in shapes)
    return sum(few_bits_size(shape, _PRECISION.heads, block) for shape, block in sizes if block is not None)


def _join_blocks(graph: ir.Graph, stack: ir.Node) -> None:
    """Turn a Concat [B, K, H] of ``x + silu(W y + b)``, with W and b of each head, into one product and one sum of all rows."""
    sums = [value.producer() for value in stack.inputs if value is not None]
    blocks = [None if node is None or node.op_type != "Add" else _block(node) for node in sums]
    if stack.attributes["axis"].as_int() != 1 or len(blocks) < 2:
        return
    found = [block for block in blocks if block is not None]
    alike = {(x, product.x, product.transposed) for x, product in found}
    if len(found) != len(blocks) or len(alike) != 1:
        return
    x, products = found[0][0], [product for _, product in found]
    biases = [None if product.bias is None else product.bias.const_value for product in products]
    size = x.shape[-1] if x.shape is not None else None
    if None in biases or not isinstance(size, int) or {bias.shape.numpy() for bias in biases if bias is not None} != {(size,)}:
        return
    name = f"{stack.name}/blocks"
    nodes = joined(products, name)
    build = Nodes(graph, name)
    bias = new_constant(graph, np.concatenate([each.numpy() for each in biases if each is not None]), f"{name}/bias")
    linear = build.add("Add", [nodes[-1].outputs[0], bias])
    rows = build.add("Reshape", [linear, build.constant("shape", [0, len(products), size])])  # [B, K, H]
    silu = build.add("Mul", [rows, build.add("Sigmoid", [rows])])
    total = build.add("Add", [x, silu])
    total.shape = stack.outputs[0].shape
    assert stack.graph is not None
    stack.graph.insert_before(stack, [*nodes, *build.nodes])
    replace_uses(total, stack.outputs[0])


def _block(total: ir.Node) -> tuple[ir.Value, Product] | None:
    """Return ``x`` and the product of ``x + silu(product)``."""
    for x, value in (total.inputs, total.inputs[::-1]):
        gated = producer_if(value, "Mul")
        linear, sigmoid = match_commutative(gated, "Sigmoid")
        if x is None or linear is None or sigmoid is None or sigmoid.inputs[0] is not linear:
            continue
        product = product_of(linear, readers=2)
        if product is not None and product.x.dtype == ir.DataType.FLOAT and product.bias is not None:
            return x, product
    return None
