"""Keeps the names of modules at the matrix products that they make, and drops all else that the exporter notes at nodes.

The exporter notes for every node the stack trace, the graph and the module that it comes from. Stack traces name files of the
machine. Only the module's name stays, as two entries of the node's metadata::

    decoder.layers.3.mlp.up_proj   ->   layer: 3   role: mlp.up_proj
    projection                     ->              role: projection

``layer`` is absent outside the backbone's layers. Passes that join products join their roles with ``+``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

LAYER, ROLE = "layer", "role"
_SCOPES = "pkg.torch.onnx.name_scopes"  # module names from the outermost on, then the operator's
# A decoder that iterates over a part of its layers puts the slice into the name: layers.slice(None, 2, None).0
_IN_LAYER = re.compile(r"(?:^|\.)layers\.(?:slice\([^)]*\)\.)?(\d+)\.(.+)$")


def keep_names(model: ir.Model) -> None:
    """Replace the exporter's metadata, in place, by the names of the modules that make a MatMul."""
    named = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        scopes = node.metadata_props.get(_SCOPES)
        if node.op_type == "MatMul" and scopes is not None:
            named[node] = _names(ast.literal_eval(scopes))
    passes.ClearMetadataAndDocStringPass()(model)
    for node, names in named.items():
        node.metadata_props.update(names)


def joined_names(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Name a product that does the work of several: their common layer, and their roles joined by ``+``."""
    known = [part for part in parts if ROLE in part]
    if not known:
        return {}
    layers = {part.get(LAYER) for part in known}
    layer = layers.pop() if len(layers) == 1 else None
    return ({} if layer is None else {LAYER: layer}) | {ROLE: "+".join(part[ROLE] for part in known)}


def _names(scopes: list[str]) -> dict[str, str]:
    """Split the name of the innermost module into a layer and a role; an operator outside any submodule has no name."""
    module = scopes[-2] if len(scopes) > 1 else ""
    found = _IN_LAYER.search(module)
    if found is not None:
        return {LAYER: found[1], ROLE: found[2]}
    return {ROLE: module} if module else {}
