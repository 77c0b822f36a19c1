"""Measures what one of a bundle's step graphs takes on disk. Graphs share files of weights, and each reads its own part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ...runtime.files.bundle import Bundle


def variant_size(bundle: Bundle, variant: str) -> dict[str, Any]:
    """Measure the variant.

    ``bytes``: the graph's file and the weights that it reads from others. ``files``: all of these, with their whole sizes.

    Raises:
        BundleIntegrityError: the graph can't be read.
        MissingDependencyError: onnx isn't installed.
    """
    from ...calibration.int8.matmuls import read_graph

    name = bundle.manifest.variants[variant]
    model = read_graph(bundle, name)
    sizes = {file: record.size for file, record in bundle.manifest.files.items()}
    read: set[tuple[str, int, int]] = set()  # tensors that are the same bytes count once
    for tensor in _external(model.graph):
        place = {entry.key: entry.value for entry in tensor.external_data}
        file = (PurePosixPath(name).parent / place["location"]).as_posix()
        start = int(place.get("offset", 0))
        read.add((file, start, int(place.get("length", sizes[file] - start))))
    graph, weights = sizes[name], sum(length for _, _, length in read)
    files = {name: graph} | {file: sizes[file] for file in sorted({file for file, _, _ in read})}
    return {"bytes": graph + weights, "graph_bytes": graph, "weights_bytes": weights, "files": files}


def _external(graph: Any) -> Iterator[Any]:
    """Yield the tensors of a graph, and of the branches in it, whose values are in other files."""
    import onnx

    yield from (tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _external(attribute.g)
