"""Exact logits for the few tokens that matter, behind a vocabulary projection in few bits.

The quantised projection says which tokens are the likely ones; the weights of those, which are there anyway where they are the
embedding, are multiplied again in float32. What is greedily chosen, and what is worth sampling, is then as exact as the hidden
state, for the reading of a few rows instead of all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .cpu_products import CpuProduct
from .patterns import new_constant, new_node


def rescore(graph: ir.Graph, projection: CpuProduct, approximate: ir.Value, count: int) -> ir.Value:
    """Nodes behind ``approximate`` [B, R, V] that compute the ``count`` largest logits again; returns the logits.

    The projection's weight stays in the graph: [V, H], or [H, V] where it isn't shared with the embedding.
    """
    (weight,) = projection.weights
    prefix = f"{projection.node.name}/rescore"

    last = new_constant(graph, np.array([-1]), f"{prefix}/last")
    most = new_constant(graph, np.array([min(count, projection.shape[0])]), f"{prefix}/count")
    top = ir.Node("", "TopK", [approximate, most], num_outputs=2, name=f"{prefix}/TopK")
    top.outputs[0].name, top.outputs[1].name = f"{prefix}/rough", f"{prefix}/likely"
    likely = top.outputs[1]  # [B, R, count]
    nodes = [top]

    def add(op: str, inputs: list[ir.Value], attributes: dict[str, object] | None = None) -> ir.Value:
        nodes.append(new_node(op, inputs, attributes or {}, prefix))
        return nodes[-1].outputs[0]

    rows = add("Gather", [weight, likely], {"axis": 0 if projection.transposed else 1})
    if not projection.transposed:
        rows = add("Transpose", [rows], {"perm": [1, 2, 3, 0]})  # [B, R, count, H]
    hidden = add("Unsqueeze", [projection.activation, last])
    exact = add("Squeeze", [add("MatMul", [rows, hidden]), last])
    logits = add("ScatterElements", [approximate, likely, exact], {"axis": -1})
    graph.insert_after(approximate.producer(), nodes)  # type: ignore[arg-type]
    return logits
