"""Exact logits for the few tokens that matter, behind a vocabulary projection in few bits.

The quantised projection says which tokens are the likely ones; the weights of those, which are there anyway where they are the
embedding, are multiplied again in float32. What is greedily chosen, and what is worth sampling, is then as exact as the hidden
state, for the reading of a few rows instead of all.
"""

from __future__ import annotations

import onnx_ir as ir

from .cpu_products import CpuProduct
from .patterns import Nodes, stand_for


def rescore(graph: ir.Graph, projection: CpuProduct, approximate: ir.Value, count: int) -> ir.Value:
    """Nodes behind ``approximate`` [B, R, V] that compute the ``count`` largest logits again; returns the logits.

    The greedy choice is the largest of those that were computed again.
    The projection's weight stays in the graph: [V, H], or [H, V] where it isn't shared with the embedding.
    """
    (weight,) = projection.weights
    build = Nodes(graph, f"{projection.node.name}/rescore")
    last, most = build.constant("last", [-1]), build.constant("count", [min(count, projection.shape[0])])
    rough, likely = (ir.Value(name=f"{build.prefix}/{name}") for name in ("rough", "likely"))  # [B, R, count]
    build.add("TopK", [approximate, most], outputs=[rough, likely])
    rows = build.add("Gather", [weight, likely], {"axis": 0 if projection.transposed else 1})
    if not projection.transposed:
        rows = build.add("Transpose", [rows], {"perm": [1, 2, 3, 0]})  # [B, R, count, H]
    hidden = build.add("Unsqueeze", [projection.activation, last])
    exact = build.add("Squeeze", [build.add("MatMul", [rows, hidden]), last])
    logits = build.add("ScatterElements", [approximate, likely, exact], {"axis": -1})
    for choice in projection.node.outputs[0].consumers():
        if choice.op_type == "ArgMax" and [choice.attributes[name].as_int() for name in ("axis", "keepdims")] == [-1, 0]:
            # Looking through all logits once more takes as long as finding the likely ones did.
            first = build.add("ArgMax", [exact], {"axis": -1, "keepdims": 1})
            greedy = build.add("Squeeze", [build.add("GatherElements", [likely, first], {"axis": -1}), last])
            greedy.shape = choice.outputs[0].shape
            stand_for(greedy, choice.outputs[0])
    graph.insert_after(approximate.producer(), build.nodes)  # type: ignore[arg-type]
    return logits
