"""Computes exact logits for the few tokens that matter, behind a vocabulary projection in few bits.

The quantised projection says which tokens are likely. Their weights are multiplied again in float32; those are in the graph
anyway where they are the embedding. The greedy choice, and what is worth sampling, are then as exact as the hidden state, for
the reading of a few rows instead of all.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .matmuls import CpuMatmul
from .patterns import Nodes, replace_uses


def rescore(graph: ir.Graph, projection: CpuMatmul, approximate: ir.Value, count: int) -> ir.Value:
    """Compute the ``count`` largest logits of ``approximate`` [B, R, V] again, in nodes behind it, and return the logits.

    The greedy choice becomes the largest of the logits that are computed again. The projection's weight stays in the graph:
    [V, H], or [H, V] where it isn't shared with the embedding.
    """
    build = Nodes(graph, f"{projection.node.name}/rescore")
    _, likely = largest(build, approximate, min(count, projection.shape[0]))
    exact = exact_logits(build, projection, likely)
    logits = build.add("ScatterElements", [approximate, likely, exact], {"axis": -1})
    for choice in greedy_choices(projection):
        # Looking through all logits once more takes as long as finding the likely ones did.
        replace_uses(likeliest(build, likely, exact, choice), choice)
    graph.insert_after(approximate.producer(), build.nodes)  # type: ignore[arg-type]
    return logits


def largest(build: Nodes, values: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    """Take the ``count`` largest of ``values`` [B, R, V], largest first. Returns values and tokens, both [B, R, count]."""
    found, tokens = (ir.Value(name=f"{build.prefix}/{name}") for name in ("largest", "likely"))
    build.add("TopK", [values, build.constant("count", [count])], outputs=[found, tokens])
    return found, tokens


def exact_logits(build: Nodes, projection: CpuMatmul, tokens: ir.Value) -> ir.Value:
    """Compute the logits of ``tokens`` [B, R, n] from the projection's own weights, in that shape."""
    (weight,) = projection.weights
    last = build.constant("last", [-1])
    rows = build.add("Gather", [weight, tokens], {"axis": 0 if projection.transposed else 1})
    if not projection.transposed:
        rows = build.add("Transpose", [rows], {"perm": [1, 2, 3, 0]})  # [B, R, n, H]
    hidden = build.add("Unsqueeze", [projection.activation, last])
    return build.add("Squeeze", [build.add("MatMul", [rows, hidden]), last])


def likeliest(build: Nodes, tokens: ir.Value, logits: ir.Value, like: ir.Value) -> ir.Value:
    """Choose the token of the largest logit among ``tokens``, both [B, R, n]. The result has the shape of ``like`` [B, R]."""
    first = build.add("ArgMax", [logits], {"axis": -1, "keepdims": 1})
    token = build.add("Squeeze", [build.add("GatherElements", [tokens, first], {"axis": -1}), build.constant("last", [-1])])
    token.type, token.shape = ir.TensorType(ir.DataType.INT64), like.shape
    return token


def greedy_choices(projection: CpuMatmul) -> Iterator[ir.Value]:
    """Yield the greedy choices of the projection's logits: values [B, R]."""
    for node in projection.node.outputs[0].consumers():
        if node.op_type == "ArgMax" and [node.attributes[name].as_int() for name in ("axis", "keepdims")] == [-1, 0]:
            yield node.outputs[0]
