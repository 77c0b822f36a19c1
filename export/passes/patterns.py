"""What passes over a graph find patterns with, and how one value takes another's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"


def producer_if(value: ir.Value | None, op: str, domain: str = "") -> ir.Node | None:
    """The node of kind ``op`` that makes ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and node.domain == domain else None


def match_commutative(node: ir.Node | None, op: str) -> tuple[ir.Value | None, ir.Node | None]:
    """Of a node with two inputs: the one that no ``op`` makes, and the ``op`` that makes the other."""
    if node is not None:
        for this, other in (node.inputs[:2], node.inputs[1::-1]):
            made = producer_if(other, op)
            if made is not None:
                return this, made
    return None, None


def elements(value: ir.Value | None) -> list[float] | None:
    """The elements of a small constant."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size > 8 else [float(x) for x in tensor.numpy().ravel()]


def new_node(
    op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, object], name: str | None, *, domain: str = ""
) -> ir.Node:
    """A node of one output, named after the value that it stands for: values have names, nodes need not."""
    converted = ir.convenience.convert_attributes(attributes)  # type: ignore[arg-type]
    node = ir.Node(domain, op, inputs, converted, name=f"{name}/{op}")
    node.outputs[0].name = f"{node.name}_output"
    return node


def new_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """An initializer of ``graph``."""
    tensor = ir.tensor(array, name=name)
    shape = ir.Shape(array.shape)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def take_place(value: ir.Value, node: ir.Node) -> None:
    """Let ``value`` stand for the output of ``node``, under its name, and remove the node."""
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    old.name, value.name = f"{name}/exact", name
    graph.remove(node, safe=True)


def replace_uses(value: ir.Value, old: ir.Value) -> None:
    """Let ``value`` be read where ``old`` was, as an output of the graph too; what nobody reads any more is removed later."""
    value.type = old.type if value.type is None else value.type
    if old.is_graph_output():
        value.name, old.name = old.name, f"{old.name}/before"
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


class Nodes:
    """Builds a run of nodes; constants become initializers with unique names."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(
        self,
        op: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        *,
        outputs: list[ir.Value] | None = None,
        domain: str = "",
    ) -> ir.Value:
        attrs = ir.convenience.convert_attributes(attributes or {})  # type: ignore[arg-type]
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        node = ir.Node(domain, op, inputs, attrs, outputs=outputs, num_outputs=None if outputs else 1, name=name)
        if not outputs:
            node.outputs[0].name = f"{name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, values: object, dtype: type[np.generic] = np.int64) -> ir.Value:
        full = f"{self.prefix}/{name}"
        if full not in self.graph.initializers:
            new_constant(self.graph, np.asarray(values, dtype), full)
        return self.graph.initializers[full]
