"""Points the initializers of a traced graph into the files that hold a backbone's weights."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backbone.record import Backbone
from ..backbone.safetensors_header import StoredTensor
from ..weights import BundleTensor
from .optimise import optimise
from .quiet import quiet


def link_weights(model: ir.Model, backbone: Backbone, mapped: Mapping[int, StoredTensor]) -> None:
    """Optimise a graph that was traced from fake parameters, and let its initializers refer to the stored tensors.

    ``mapped``: places of further tensors, by the address that they are mapped to.
    Leaves a graph alone whose backbone is in memory: the exporter has optimised it.
    """
    named = ((parameter, backbone.weights.stored(name)) for name, parameter in backbone.module.named_parameters())
    places = {id(parameter): stored for parameter, stored in named if stored is not None}
    if not places:
        return
    linked = {}
    for value in model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        found: StoredTensor | None = None
        if isinstance(raw, FakeTensor):
            found = places[id(raw)]
        elif isinstance(raw, torch.Tensor):
            found = mapped.get(raw.data_ptr())
        if found is not None:
            linked[value] = found
            value.const_value = None  # nothing that depends on it may be folded
    with quiet():
        optimise(model, _keeps_weights)
    for value, stored in linked.items():
        value.const_value = _external(stored, value)


def _keeps_weights(node: ir.Node) -> bool | None:
    """Refuse to fold a transposed weight: products that share an input are merged output by output, as weights are stored."""
    weight = node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    return False if weight else None


def _external(stored: StoredTensor, value: ir.Value) -> ir.ExternalTensor:
    """Make the tensor of ``value`` a reference to ``stored``, in the folder that the graph is written to."""
    assert value.dtype is not None
    return BundleTensor(
        stored.file.name,
        stored.offset,
        stored.nbytes,
        value.dtype,
        shape=ir.Shape(stored.shape),
        name=value.name or "",
        base_dir=stored.file.parent,
    )
