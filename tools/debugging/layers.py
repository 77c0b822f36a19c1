"""Names the tensors of a device graph that are worth comparing, in the order in which they are computed, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Marked:
    """A tensor, the node that makes it, and a few words on where it stands: the layer, and the product or the attention."""

    tensor: str
    node: str
    place: str


def marked_tensors(model: ir.Model) -> list[Marked]:
    """List the results of all products and attentions, then the graph's outputs."""
    from ...export.passes.matmuls import attention_layer, layer_of
    from ...export.quantise.takers import attention_of
    from ...export.quantise.w8a8 import parts

    found: list[Marked] = []
    part, last = parts(model.graph), None
    for node in model.graph:
        layer = attention_layer(node) if node.op_type == "Attention" else None
        last = last if layer is None else layer
        name, output = str(node.name), node.outputs[0]
        if layer is not None:
            found.append(Marked(str(output.name), name, f"layer {layer}, attention"))
        elif name in part:
            if part[name] != "backbone":
                place = {"projection": "vocabulary projection", "heads": "heads"}[part[name]]
            else:
                of = layer_of(node, last)
                after = attention_of(node.inputs[0]) is not None
                before = of != last
                role = "attention's output product" if after else "query, key or value product" if before else "MLP product"
                place = f"layer {of}, {role}"
            found.append(Marked(str(output.name), name, place))
    known = {entry.tensor for entry in found}
    for value in model.graph.outputs:
        made = value.producer()
        if value.name not in known and made is not None:
            found.append(Marked(str(value.name), str(made.name), "output"))
    return found
