"""Makes CPU graphs that step several slots at once: their rows are one batch, and each slot has an attention of its own.

Products and norms take all rows of all slots as one sequence, so a step reads each weight once. Every attention becomes a Split
by ``rows_of_slot``, one GroupQueryAttention a slot over that slot's cache, and a Concat. A row's numbers are those of a step of
its slot alone, bit for bit, wherever a kernel computes a row without regard to the others.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.executors import step_io
from ...runtime.files.manifest import packed_twin
from ..weights import read_graph
from .merge import ATTENTION
from .patterns import MICROSOFT, Nodes, producer_if, replace_uses

_QUERY, _LAST_ROWS, _VISIBLE, _POSITIONS, _MASK = 0, 5, 6, 9, 10  # inputs of the attention
_CACHES = (3, 4)


def write_packed(graph: Path) -> list[Path]:
    """Write a packed graph for each of ``step_io.PACKED_SLOTS`` beside a CPU graph, over the same weights.

    Returns their paths; none where the graph's attention isn't GroupQueryAttention.
    """
    model, written = read_graph(graph), []
    if not any(node.op_type == ATTENTION for node in model.graph):
        return []
    for slots in step_io.PACKED_SLOTS:
        packed = model.clone()
        pack(packed, slots)
        path = graph.with_name(packed_twin(graph.name, slots))
        ir.save(packed, path)
        written.append(path)
    return written


def pack(model: ir.Model, slots: int) -> None:
    """Turn a CPU graph for one slot, in place, into one for ``slots`` slots."""
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    rows_of_slot = _input(graph, step_io.ROWS_OF_SLOT, ir.DataType.INT64, [slots])
    positions = _split(graph, inputs[step_io.POSITIONS], rows_of_slot, slots, "pack/positions")
    replaced: list[ir.Value] = []
    for attention in [node for node in graph if node.op_type == ATTENTION and node.domain == MICROSOFT]:
        _attend_by_slot(graph, attention, rows_of_slot, positions, slots, replaced)
    _accept_by_slot(graph, slots)
    passes.RemoveUnusedNodesPass()(model)
    for value in replaced:
        for use in [use for use in value.uses() if _counts_slots(use.node)]:
            use.node.replace_input_with(use.idx, inputs[step_io.TOKENS])
        assert not value.uses(), f"{value.name} is still read"
        graph.inputs.remove(value)
    if not inputs[step_io.POSITIONS].uses():
        graph.inputs.remove(inputs[step_io.POSITIONS])


def _attend_by_slot(
    graph: ir.Graph,
    attention: ir.Node,
    rows_of_slot: ir.Value,
    positions: list[ir.Value],
    slots: int,
    replaced: list[ir.Value],
) -> None:
    """Replace an attention by one a slot. ``replaced`` gets the graph's inputs that nothing reads any more."""
    name = str(attention.name)
    for value in [attention.inputs[index] for index in (*_CACHES, _LAST_ROWS, _VISIBLE, _MASK)]:
        if value is not None and value not in replaced:
            replaced.append(value)
    parts = [
        _split(graph, value, rows_of_slot, slots, f"{name}/{index}", before=attention) if value is not None else None
        for index, value in enumerate(attention.inputs[:3])
    ]
    attended, presents = [], []
    for slot in range(slots):
        given: list[ir.Value | None] = [None if part is None else part[slot] for part in parts]
        for index, value in enumerate(attention.inputs[3:], start=3):
            if value is None or not value.is_graph_input():
                given.append(value)
            else:
                given.append(positions[slot] if index == _POSITIONS else _of_slot(graph, value, slot))
        outputs = [ir.Value(name=f"{attention.outputs[0].name}@{slot}")]
        outputs += [ir.Value(name=step_io.of_slot(str(value.name), slot)) for value in attention.outputs[1:]]
        for made, old in zip(outputs, attention.outputs, strict=True):
            made.type = old.type
        copy = ir.Node(MICROSOFT, ATTENTION, given, list(attention.attributes.values()), outputs=outputs, name=f"{name}@{slot}")
        graph.insert_before(attention, [copy])
        attended.append(outputs[0])
        presents += [outputs[1:]]
    together = ir.node("Concat", attended, {"axis": 1}, name=f"{name}/together")
    together.outputs[0].name = f"{attention.outputs[0].name}/together"
    together.outputs[0].shape = attention.outputs[0].shape
    graph.insert_before(attention, [together])
    replace_uses(together.outputs[0], attention.outputs[0])
    for index, old in enumerate(attention.outputs[1:]):
        at = graph.outputs.index(old)
        new = [values[index] for values in presents]
        for slot, value in enumerate(new):
            value.shape = _shape(old, slot)
        graph.outputs[at : at + 1] = new
    graph.remove(attention, safe=True)


def _counts_slots(node: ir.Node) -> bool:
    """True for a Shape that only takes the first axis, which all inputs of one call share. A trace may read any of them."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return node.op_type == "Shape" and (start is None or start.as_int() == 0) and end is not None and end.as_int() == 1


def _accept_by_slot(graph: ir.Graph, slots: int) -> None:
    """Choose the deepest accepted row of each slot, and run the heads at these rows.

    The scores [1, 1, L] of all rows with logits become [1, slots, L]: a slot's own ones, and the others far below.
    """
    outputs = {value.name: value for value in graph.outputs}
    row, token = (producer_if(outputs[name], "Squeeze") for name in (step_io.LAST_ROW, step_io.NEXT_TOKEN))
    assert row is not None and token is not None
    taken = producer_if(token.inputs[0], "GatherElements")
    deepest = None if taken is None else producer_if(taken.inputs[1], "ArgMax")
    assert taken is not None and deepest is not None, "the CPU graph accepts by an ArgMax of scores"
    own = _input(graph, step_io.OWN_ROWS, ir.DataType.FLOAT, [slots, "L"])
    build = Nodes(graph, "pack")
    scores = build.add("Add", [deepest.inputs[0], own])
    graph.insert_before(deepest, build.nodes)
    deepest.replace_input_with(0, scores)
    chosen, tokens = deepest.outputs[0], taken.outputs[0]  # [1, slots]
    for value in (chosen, tokens, *row.inputs[:1]):
        assert value is not None
        value.shape = None  # it was that of one slot
    behind = Nodes(graph, "pack/heads")
    swap = {"perm": [1, 0]}
    by_slot = behind.add("Transpose", [tokens], swap)  # [slots, 1]: the heads' batch
    for use in [use for use in tokens.uses() if use.node not in (token, *behind.nodes)]:
        use.node.replace_input_with(use.idx, by_slot)
    graph.insert_after(taken, behind.nodes)
    for use in [use for use in chosen.uses() if use.node.op_type == "Unsqueeze"]:
        for state in [each.node for each in use.node.outputs[0].uses() if each.node.op_type == "GatherND"]:
            states = Nodes(graph, f"{state.name}/by_slot")
            turned = states.add("Transpose", [state.outputs[0]], {"perm": [1, 0, 2]})  # [1, slots, H] to [slots, 1, H]
            for other in [each for each in state.outputs[0].uses() if each.node is not states.nodes[0]]:
                other.node.replace_input_with(other.idx, turned)
            state.outputs[0].shape = None
            assert state.graph is not None
            state.graph.insert_after(state, states.nodes)
    first = Nodes(graph, "pack/slots").constant("first", [0])
    for squeeze in (row, token):
        squeeze.replace_input_with(1, first)
        squeeze.outputs[0].shape = ir.Shape([slots])
    for name in (step_io.CANDIDATES, step_io.LOG_PROBS):
        made = outputs[name].producer()
        width = outputs[name].shape
        assert made is not None and width is not None
        outputs[name].shape = ir.Shape([slots, *width[1:]])
        for attribute in made.attributes.values():
            for value in attribute.as_graph().outputs if attribute.type == ir.AttributeType.GRAPH else ():
                value.shape = None


def _split(
    graph: ir.Graph, value: ir.Value, rows_of_slot: ir.Value, slots: int, name: str, before: ir.Node | None = None
) -> list[ir.Value]:
    """Split rows [1, R, …] into those of each slot."""
    parts = [ir.Value(name=f"{name}@{slot}", type=value.type) for slot in range(slots)]
    node = ir.Node("", "Split", [value, rows_of_slot], [ir.AttrInt64("axis", 1)], outputs=parts, name=f"{name}/split")
    graph.insert_before(graph[0] if before is None else before, [node])
    return parts


def _of_slot(graph: ir.Graph, value: ir.Value, slot: int) -> ir.Value:
    """Return the graph's input that stands for ``value`` in one slot."""
    name = step_io.of_slot(str(value.name), slot)
    found = next((each for each in graph.inputs if each.name == name), None)
    if found is not None:
        return found
    made = ir.Value(name=name, type=value.type, shape=_shape(value, slot))
    graph.inputs.append(made)
    return made


def _shape(value: ir.Value, slot: int) -> ir.Shape:
    """Return the shape of what stands for ``value`` in one slot. Caches may have other rows from slot to slot."""
    assert value.shape is not None
    dims = [1 if str(dim) == "B" else dim if isinstance(dim, int) else f"{dim}@{slot}" for dim in value.shape]
    if str(value.name).startswith(("past_", "present_")):
        dims[2] = f"S@{slot}"
    return ir.Shape(dims)


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value
