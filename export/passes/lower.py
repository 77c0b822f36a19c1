"""Turns the abstract attention nodes of a traced step graph into operators that engines have.

``lower_standard`` uses operators of opset 24 only (TensorScatter, Attention).
``lower_device`` uses the same operators for the graph that TensorRT parses. Its outputs are the next step's inputs, and accepted
rows are carried outside the caches. Attention with a soft cap is taken apart there.
``lower_cpu`` uses ONNX Runtime's GroupQueryAttention, whose cost on a CPU follows the valid length instead of the capacity. The
operator writes the new rows itself, so the executor moves the rows that the previous step accepted, and ``commit`` disappears.
The operator takes heads of 8, 16, 24 … elements. Other heads get the standard operators, which write the new rows alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.executors import step_io
from ..trace.attention import DOMAIN, OP
from .cpu_graph import drop_replaced, heads_if_wanted, take_from_host, window
from .fuse import fuse
from .head_rows import take_head_rows
from .merge import ATTENTION, merge
from .patterns import MICROSOFT, Nodes

_Attend = Callable[[Nodes, ir.Node, ir.Value, ir.Value, ir.Value, ir.Value], None]
_FUSED_HEADS = 8
"""GroupQueryAttention takes heads whose size is a multiple of this."""

_Lowering = Callable[[ir.Graph, ir.Node, "dict[str, ir.Value]"], "list[ir.Node]"]


def _each_attention(model: ir.Model, lowering: _Lowering, shared: dict[str, ir.Value]) -> None:
    graph = model.graph
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == OP:
            outputs = list(node.outputs)
            nodes = lowering(graph, node, shared)
            graph.insert_before(node, nodes)
            replacements = [next(v for n in nodes for v in n.outputs if v.name == f"{o.name}/lowered") for o in outputs]
            for old, new in zip(outputs, replacements, strict=True):
                new.shape, new.type = old.shape, old.type
                name = old.name
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
                old.name, new.name = f"{name}/abstract", name
            graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _output(value: ir.Value) -> ir.Value:
    return ir.Value(name=f"{value.name}/lowered")


def lower_standard(model: ir.Model) -> None:
    """Replace each attention, in place, by a commit gather, one TensorScatter a cache, slices to T and Attention."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    kv_heads, head_dim = (int(inputs[step_io.past_names(1)[0]].shape[axis]) for axis in (1, 3))  # type: ignore[index, arg-type]
    margin = int(inputs[step_io.COMMIT].shape[1])  # type: ignore[index, arg-type]
    head = Nodes(graph, "commit")
    # GatherElements takes an index per element: [B, H_kv, K, D_h], the same for every cache.
    index = head.add("Unsqueeze", [inputs[step_io.COMMIT], head.constant("axes", [1, 3])])
    tile = head.constant("repeats", [1, kv_heads, 1, head_dim])
    shared = {
        "index": head.add("Tile", [index, tile]),
        "write_index": head.add("Sub", [inputs[step_io.WRITE_INDEX], head.constant("margin", margin)]),
        "length": head.add("Shape", [inputs[step_io.COLUMNS]]),
    }
    graph.insert_before(graph[0], head.nodes)
    _each_attention(model, _standard_attention, shared)


def lower_device(model: ir.Model) -> None:
    """Replace each attention, in place, like :func:`lower_standard`, but take the rows to move from ``carried`` inputs.

    An engine may write a cache in place before another node reads its old rows; in this graph no node reads them.
    """
    take_head_rows(model)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    past = [value for value in graph.inputs if str(value.name).startswith("past_")]
    batch, kv_heads, _, head_dim = past[0].shape  # type: ignore[misc]
    heads = int(inputs[step_io.COMMIT].shape[1])  # type: ignore[index, arg-type]
    carried = [
        ir.Value(name=name, type=value.type, shape=ir.Shape([batch, kv_heads, "P", head_dim]))
        for name, value in zip(step_io.carried_names(len(past) // 2), past, strict=True)
    ]
    int64 = ir.TensorType(ir.DataType.INT64)
    kept = ir.Value(name=step_io.KEPT, type=int64, shape=ir.Shape([batch, heads]))
    kept_count = ir.Value(name=step_io.KEPT_COUNT, type=int64, shape=ir.Shape([batch]))
    head = Nodes(graph, "carry")
    zero, one, first = head.constant("zero", 0), head.constant("one", 1), head.constant("first", [1])
    count = head.add("Unsqueeze", [kept_count, first])  # [B, 1]
    before = head.add("Shape", [carried[0]], {"start": 2, "end": 3})
    rows = head.add("Shape", [inputs[step_io.TOKENS]], {"start": 1, "end": 2})
    written = head.add("Add", [rows, head.constant("heads", [heads])])
    order = head.add("Range", [zero, head.add("Squeeze", [written]), one])  # [K + N]
    # Index into the carried rows followed by the new rows: the kept rows, the new rows, then the last new row to the end.
    own = head.add("Min", [head.add("Sub", [order, count]), head.add("Sub", [rows, first])])
    padding = head.add("Expand", [head.constant("padding", [[0]]), head.add("Shape", [inputs[step_io.TOKENS]])])
    index = head.add(
        "Where",
        [head.add("Less", [order, count]), head.add("Concat", [kept, padding], {"axis": 1}), head.add("Add", [own, before])],
    )
    index = head.add("Unsqueeze", [index, head.constant("axes", [1, 3])])
    shared = {
        "index": head.add("Tile", [index, head.constant("repeats", [1, kv_heads, 1, head_dim])]),
        "write_index": head.add("Sub", [inputs[step_io.WRITE_INDEX], kept_count]),
        "length": head.add("Shape", [inputs[step_io.COLUMNS]]),
    }
    shared |= {f"carried of {cache.name}": value for cache, value in zip(past, carried, strict=True)}
    graph.insert_before(graph[0], head.nodes)
    news = [node.inputs[which] for node in graph if node.domain == DOMAIN and node.op_type == OP for which in (1, 2)]
    _each_attention(model, _device_attention, shared)
    at = graph.inputs.index(inputs[step_io.COMMIT])
    graph.inputs[at : at + 1] = [kept, kept_count]
    graph.inputs.extend(carried)
    for name, value in zip(step_io.new_names(len(past) // 2), news, strict=True):
        assert value is not None
        value.name = name
        graph.outputs.append(value)


def drop_closing(model: ir.Model) -> None:
    """Remove the device graph's outputs and inputs from a traced step graph, in place."""
    graph = model.graph
    closing = [value for value in graph.outputs if value.name in step_io.CLOSING]
    for value in closing:
        graph.outputs.remove(value)
    passes.RemoveUnusedNodesPass()(model)
    inputs = {value.name: value for value in graph.inputs}
    slots, tokens = inputs[step_io.DRAFT_SLOTS], inputs[step_io.TOKENS]
    assert all(node.op_type == "Shape" for node in slots.consumers()), "only its shape, that of tokens, is used elsewhere"
    ir.convenience.replace_all_uses_with(slots, tokens)
    graph.inputs.remove(slots)


def _standard_attention(graph: ir.Graph, node: ir.Node, shared: dict[str, ir.Value]) -> list[ir.Node]:
    def update(build: Nodes, past: ir.Value, new: ir.Value) -> ir.Value:
        moved = build.add("GatherElements", [past, shared["index"]], {"axis": 2})
        return build.add("Concat", [moved, new], {"axis": 2})

    return _attention_over_caches(graph, node, shared, update, _fused_attention)


def _device_attention(graph: ir.Graph, node: ir.Node, shared: dict[str, ir.Value]) -> list[ir.Node]:
    def update(build: Nodes, past: ir.Value, new: ir.Value) -> ir.Value:
        both = build.add("Concat", [shared[f"carried of {past.name}"], new], {"axis": 2})
        return build.add("GatherElements", [both, shared["index"]], {"axis": 2})

    attend = _capped_attention if node.attributes["softcap"].as_float() else _fused_attention  # TensorRT's has no cap
    return _attention_over_caches(graph, node, shared, update, attend)


def _attention_over_caches(
    graph: ir.Graph,
    node: ir.Node,
    shared: dict[str, ir.Value],
    update_of: Callable[[Nodes, ir.Value, ir.Value], ir.Value],
    attend: _Attend,
) -> list[ir.Node]:
    """Make a TensorScatter a cache, of the rows that ``update_of`` (past, new) makes, then slices to T and the attention."""
    query, key, value, past_key, past_value, mask = node.inputs[:6]
    build = Nodes(graph, str(node.name))
    sliced = []
    for past, new, present in ((past_key, key, node.outputs[1]), (past_value, value, node.outputs[2])):
        assert past is not None and new is not None
        update = update_of(build, past, new)
        scattered = build.add("TensorScatter", [past, update, shared["write_index"]], {"axis": -2}, outputs=[_output(present)])
        zero, axis = build.constant("zero", [0]), build.constant("axis", [2])
        sliced.append(build.add("Slice", [scattered, zero, shared["length"], axis]))
    assert query is not None and mask is not None
    attend(build, node, query, sliced[0], sliced[1], mask)
    return build.nodes


def _fused_attention(build: Nodes, node: ir.Node, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> None:
    build.add("Attention", [query, keys, values, mask], _scores(node), outputs=[_output(node.outputs[0])])


def _capped_attention(build: Nodes, node: ir.Node, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> None:
    """Compute ``softmax(cap · tanh(scale · q·kᵀ / cap) + mask) · v`` step by step, in float32 between the products.

    Queries of the heads that share keys are rows of one product: [B, H, N, D_h] is [B, H_kv, (H / H_kv)·N, D_h].
    """
    past = node.inputs[3]
    assert query.shape is not None and query.dtype is not None and past is not None and past.shape is not None
    heads, kv_heads, head_dim = query.shape[1], past.shape[1], past.shape[3]
    scale, cap = (node.attributes[name].as_float() for name in ("scale", "softcap"))
    type_of, to_float = query.dtype, {"to": int(ir.DataType.FLOAT)}
    factor = build.constant("factor", scale, type_of.numpy().type)
    rows = build.add("Reshape", [build.add("Mul", [query, factor]), build.constant("shared", [0, kv_heads, -1, head_dim])])
    scores = build.add("MatMul", [rows, build.add("Transpose", [keys], {"perm": [0, 1, 3, 2]})])
    scores = build.add("Cast", [build.add("Reshape", [scores, build.constant("apart", [0, heads, -1, 0])])], to_float)
    limit = build.constant("cap", cap, np.float32)
    capped = build.add("Mul", [build.add("Tanh", [build.add("Div", [scores, limit])]), limit])
    weights = build.add("Softmax", [build.add("Add", [capped, build.add("Cast", [mask], to_float)])], {"axis": -1})
    together = build.add("Reshape", [weights, build.constant("together", [0, kv_heads, -1, 0])])
    attended = build.add("MatMul", [build.add("Cast", [together], {"to": int(type_of)}), values])
    build.add("Reshape", [attended, build.constant("heads", [0, heads, -1, head_dim])], outputs=[_output(node.outputs[0])])


def _scores(node: ir.Node) -> dict[str, float]:
    """Return how scores are scaled and capped: the attributes of the fused operators, whose caps come before masks."""
    scale, softcap = (node.attributes[name].as_float() for name in ("scale", "softcap"))
    return {"scale": scale, "softcap": softcap} if softcap else {"scale": scale}


def lower_cpu(model: ir.Model) -> None:
    """Replace each attention, in place, by com.microsoft GroupQueryAttention over the shared buffer; fuse, then merge.

    The host computes some inputs, and heads run only where they are wanted (:mod:`.cpu_graph`).
    """
    graph = model.graph
    shared = take_from_host(graph)
    cache = next(value for value in graph.inputs if value.name == step_io.past_names(1)[0])
    if int(cache.shape[3]) % _FUSED_HEADS:  # type: ignore[index, arg-type]
        _each_attention(model, _unfused_attention, _places(graph, shared))
    else:
        _each_attention(model, _cpu_attention, shared)
    model.opset_imports[MICROSOFT] = 1
    fuse(model)
    merge(model)
    heads_if_wanted(model)
    drop_replaced(model)


def _places(graph: ir.Graph, given: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """Compute from the host's inputs what :func:`_attention_over_caches` reads: the step's first cache row, T and whole masks.

    The host leaves a mask's columns behind the step's last row as they were: the fused operator doesn't read them.
    """
    tokens = next(value for value in graph.inputs if value.name == step_io.TOKENS)
    masks = {name: value for name, value in given.items() if name.startswith(step_io.MASK)}
    head = Nodes(graph, "places")
    zero, one = head.constant("zero", 0), head.constant("one", 1)
    rows = head.add("Shape", [tokens], {"start": 1, "end": 2})
    last = head.add("Cast", [given[step_io.LAST_ROWS]], {"to": ir.DataType.INT64})  # [B]
    visible = head.add("Cast", [given[step_io.VISIBLE]], {"to": ir.DataType.INT64})
    columns = head.add("Range", [zero, visible, one])  # [T]
    ends = head.add("Unsqueeze", [last, head.constant("axes", [1, 2, 3])])  # [B, 1, 1, 1]
    behind = head.add("Greater", [columns, ends])
    shared = {
        "write_index": head.add("Add", [head.add("Sub", [last, rows]), one]),
        "length": head.add("Shape", [columns]),
    }
    for name, mask in masks.items():
        assert mask.dtype is not None
        hidden = head.constant(f"hidden_{name}", step_io.HIDDEN_BIAS, mask.dtype.numpy().type)
        shared[name] = head.add("Where", [behind, hidden, mask])
    graph.insert_before(graph[0], head.nodes)
    return shared


def _unfused_attention(graph: ir.Graph, node: ir.Node, shared: dict[str, ir.Value]) -> list[ir.Node]:
    node.replace_input_with(5, shared[step_io.mask_name(window(node))])
    return _attention_over_caches(graph, node, shared, lambda build, past, new: new, _fused_attention)


def _cpu_attention(graph: ir.Graph, node: ir.Node, shared: dict[str, ir.Value]) -> list[ir.Node]:
    query, key, value, past_key, past_value = node.inputs[:5]
    assert query is not None and query.shape is not None and past_key is not None and past_key.shape is not None
    heads, kv_heads, head_dim = int(query.shape[1]), int(past_key.shape[1]), int(past_key.shape[3])  # type: ignore[arg-type]
    build = Nodes(graph, str(node.name))

    def rows_first(tensor: ir.Value | None, count: int, name: str) -> ir.Value:
        transposed = build.add("Transpose", [tensor], {"perm": [0, 2, 1, 3]})
        return build.add("Reshape", [transposed, build.constant(name, [0, 0, count * head_dim])])

    packed = [rows_first(query, heads, "query_shape"), *(rows_first(t, kv_heads, "kv_shape") for t in (key, value))]
    shape = ir.Shape([query.shape[0], query.shape[2], heads * head_dim])
    attended = ir.Value(name=f"{node.name}/attended", shape=shape, type=query.type)
    mask = shared[step_io.mask_name(window(node))]  # by position; the operator's own window counts cache rows
    last_rows, visible = shared[step_io.LAST_ROWS], shared[step_io.VISIBLE]
    build.add(
        ATTENTION,
        [*packed, past_key, past_value, last_rows, visible, None, None, None, mask],
        {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 0, **_scores(node)},
        outputs=[attended, _output(node.outputs[1]), _output(node.outputs[2])],
        domain=MICROSOFT,
    )
    split = build.add("Reshape", [attended, build.constant("split_shape", [0, 0, heads, head_dim])])
    build.add("Transpose", [split], {"perm": [0, 2, 1, 3]}, outputs=[_output(node.outputs[0])])
    return build.nodes
