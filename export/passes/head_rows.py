"""Lets a step of the device graph run its heads at one row or at none: products without rows read no weights.

An engine computes all its outputs, wanted or not. So the heads' row is an input whose length may be 0: ``head_rows`` int64 [W].
"""

from __future__ import annotations

import onnx_ir as ir

from ...runtime.executors import step_io
from .patterns import Nodes, producer_if

ROWS = "W"


def take_head_rows(model: ir.Model) -> None:
    """Add the input ``head_rows`` to a traced step graph, in place, and let the heads read these rows of the accepted state.

    Where there are none, the next step's drafted tokens are the root token, so that they have a value, and the output
    ``state_sum`` tells NaN in the place of the heads' results.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    rows = ir.Value(name=step_io.HEAD_ROWS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([ROWS]))
    hidden = outputs[step_io.HIDDEN]
    states = [node.outputs[0] for node in hidden.consumers() if node.op_type == "GatherElements" and node.inputs[0] is hidden]
    squeeze = producer_if(outputs[step_io.NEXT_TOKEN], "Squeeze") or outputs[step_io.NEXT_TOKEN].producer()
    assert len(states) == 1 and squeeze is not None, "the heads read one row of the hidden states, and one token"
    token = squeeze.inputs[0]
    assert token is not None
    candidates = outputs[step_io.CANDIDATES]
    slots_read = [use.node for use in inputs[step_io.DRAFT_SLOTS].uses() if use.node.op_type == "GatherElements" and use.idx == 1]
    [drafted] = slots_read
    readers = [(use.node, use.idx) for use in states[0].uses()]
    readers += [(use.node, use.idx) for use in token.uses() if use.node.op_type == "Gather" and use.idx == 1]
    taken: dict[ir.Value, ir.Value] = {}
    for node, index in readers:
        value = node.inputs[index]
        assert value is not None and value.shape is not None
        if value not in taken:
            build = Nodes(graph, f"head_rows/{len(taken)}")
            made = build.add("Gather", [value, rows], {"axis": 1})
            made.type, made.shape = value.type, ir.Shape([value.shape[0], ROWS, *value.shape[2:]])
            graph.insert_after(value.producer() or graph[0], build.nodes)
            taken[value] = made
        node.replace_input_with(index, taken[value])
    _rename_rows(list(taken.values()), {candidates, outputs[step_io.LOG_PROBS]})
    assert hidden.shape is not None
    build = Nodes(graph, "head_rows/sum")
    exact = build.add("Cast", [states[0]], {"to": int(ir.DataType.FLOAT)})
    total = build.add("ReduceSum", [exact, build.constant("axes", [1, 2])], {"keepdims": 0})
    assert hidden.shape is not None
    total.name, total.type, total.shape = step_io.STATE_SUM, ir.TensorType(ir.DataType.FLOAT), ir.Shape([hidden.shape[0]])
    producer = states[0].producer()
    assert producer is not None
    graph.insert_after(producer, build.nodes)
    graph.outputs.append(total)
    build = Nodes(graph, "head_rows/draft")
    flat = build.add("Flatten", [candidates], {"axis": 1})
    drafted.replace_input_with(0, build.add("Concat", [flat, token], {"axis": 1}))
    graph.insert_before(drafted, build.nodes)
    graph.inputs.append(rows)


def _rename_rows(changed: list[ir.Value], ends: set[ir.Value]) -> None:
    """Correct the second axis of every value between ``changed`` and ``ends``, both of them included."""
    waiting, seen = list(changed), set(changed)
    while waiting:
        value = waiting.pop()
        for node in value.consumers() if value not in ends else ():
            for output in node.outputs:
                if output not in seen:
                    seen.add(output)
                    waiting.append(output)
    for value in seen - set(changed):
        if value.shape is not None and len(value.shape) > 1:
            count = value.shape[1]
            value.shape = ir.Shape([value.shape[0], ROWS if count == 1 else f"{ROWS}*{count}", *value.shape[2:]])
