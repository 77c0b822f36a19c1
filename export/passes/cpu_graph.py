"""Takes work out of the CPU graph: the host computes masks, lengths and parents, and heads run only where they are wanted.

Except for matrix products, an operator of ONNX Runtime costs as much as starting it. The host computes these inputs in
:mod:`medusa_deploy.runtime.executors.cpu_inputs`; a few operators remain for acceptance.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.executors import step_io
from ...runtime.tree import MAX_ROWS
from ..trace.attention import DOMAIN, OP
from .patterns import Nodes, producer_if, replace_uses

_REPLACED = (step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.COLUMNS, step_io.COMMIT)


def take_from_host(graph: ir.Graph) -> dict[str, ir.Value]:
    """Add ``step_io.CPU_INPUTS`` and masks, accept by them, and return all by name.

    :func:`drop_replaced` removes what they replace.
    """
    cache = next(value for value in graph.inputs if value.name == step_io.past_names(1)[0])
    assert cache.dtype is not None
    kinds: dict[str, tuple[ir.DataType, list[str | int]]] = {
        **{step_io.mask_name(window): (cache.dtype, ["B", 1, "N", "T"]) for window in _windows(graph)},
        step_io.LAST_ROWS: (ir.DataType.INT32, ["B"]),
        step_io.VISIBLE: (ir.DataType.INT32, []),
        step_io.PARENTS: (ir.DataType.INT64, ["B", "N"]),
        step_io.PATHS: (ir.DataType.FLOAT, ["B", "N", "R"]),
    }
    given = {
        name: ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)) for name, (dtype, shape) in kinds.items()
    }
    graph.inputs.extend(given.values())
    _accept(graph, given[step_io.PARENTS], given[step_io.PATHS])
    return given


def window(attention: ir.Node) -> int | None:
    """Return the window of an abstract attention node; None if it sees all earlier tokens."""
    return attention.attributes["window"].as_int() or None


def _windows(graph: ir.Graph) -> list[int | None]:
    """List the windows of a graph's abstract attention nodes, each once; None first."""
    found = {window(node) for node in graph if node.domain == DOMAIN and node.op_type == OP}
    return sorted(found, key=lambda each: each or 0)


def _accept(graph: ir.Graph, parents: ir.Value, paths: ir.Value) -> None:
    """Find the deepest row of logits whose path has no mismatch, by one product in which a mismatch outweighs any depth.

    ``score[r] = Σ_n value[n] · paths[n, r]``, where ``value`` is 1 where a row matches and ``-2 · MAX_ROWS`` where not.
    """
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    last_row, next_token = outputs[step_io.LAST_ROW], outputs[step_io.NEXT_TOKEN]
    picked = next_token.producer()  # [B] of [B, 1], which is greedy [B, R] at the last row
    taken = None if picked is None else producer_if(picked.inputs[0], "GatherElements")
    assert taken is not None, "the traced step gathers its next token"
    greedy, last = taken.inputs
    build = Nodes(graph, "accept")
    expected = build.add("GatherElements", [greedy, parents], {"axis": 1})  # [B, N]
    match, mismatch = build.constant("match", 1.0, np.float32), build.constant("mismatch", -2.0 * MAX_ROWS, np.float32)
    value = build.add("Where", [build.add("Equal", [inputs[step_io.TOKENS], expected]), match, mismatch])
    column = build.constant("column", [1])
    score = build.add("MatMul", [build.add("Unsqueeze", [value, column]), paths])  # [B, 1, R]
    deepest = build.add("ArgMax", [score], {"axis": -1, "keepdims": 0})  # [B, 1]
    token = build.add("GatherElements", [greedy, deepest], {"axis": 1})
    row = build.add("GatherElements", [inputs[step_io.LOGIT_ROWS], deepest], {"axis": 1})
    made = [build.add("Squeeze", [each, column]) for each in (row, token)]
    for new, old in zip((deepest, token, *made), (last, taken.outputs[0], last_row, next_token), strict=True):
        assert old is not None
        new.shape = old.shape
        replace_uses(new, old)
    argmax = greedy.producer() if greedy is not None else None
    assert argmax is not None
    graph.insert_after(argmax, build.nodes)


def drop_replaced(model: ir.Model) -> None:
    """Remove nodes that nothing reads any more, and the inputs that the host's inputs replaced."""
    passes.RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name in _REPLACED]:
        assert not value.uses(), f"{value.name} is still read"
        model.graph.inputs.remove(value)


def heads_if_wanted(model: ir.Model) -> None:
    """Put the nodes that only the heads' results need into a branch of an If.

    ONNX Runtime runs all nodes of a graph, whatever is fetched.
    """
    graph = model.graph
    results = [value for value in graph.outputs if value.name in (step_io.CANDIDATES, step_io.LOG_PROBS)]
    only = _needed(results) - _needed([value for value in graph.outputs if value not in results])
    nodes = [node for node in graph if node in only]
    graph.remove(nodes)
    wanted = ir.Value(name=step_io.HEADS_WANTED, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    graph.inputs.append(wanted)
    head = Nodes(graph, "heads_unwanted")
    empty = head.constant("shape", [0] * len(results[0].shape or ()))
    for value in results:
        assert value.dtype is not None
        nothing = ir.tensor(np.zeros(1, value.dtype.numpy()))
        head.add("ConstantOfShape", [empty], {"value": nothing}).type = value.type
    unwanted = [node.outputs[0] for node in head.nodes]
    outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in results]
    for old, new in zip(results, outputs, strict=True):
        graph.outputs[graph.outputs.index(old)] = new  # a value is an output of one graph
        old.name = f"{old.name}/wanted"
    branches = {
        "then_branch": ir.Graph([], results, nodes=nodes, name="heads_wanted"),
        "else_branch": ir.Graph([], unwanted, nodes=head.nodes, name="heads_unwanted"),
    }
    attributes = [ir.AttrGraph(name, branch) for name, branch in branches.items()]
    graph.append(ir.Node("", "If", [wanted], attributes, outputs=outputs, name="heads"))


def _needed(values: list[ir.Value]) -> set[ir.Node]:
    """Return all nodes that the values depend on."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found
