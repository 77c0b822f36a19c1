"""Weights as network inputs: an engine that holds none, so that neither the build nor the plan grows with the backbone.

The bundle's graphs keep their weights as initializers. Only what TensorRT parses is rewritten: every matrix that lies in a file
becomes an input, and matrices that one vector is multiplied with (queries, keys and values; gate and up; the heads) become
one input whose pieces lie one after another. That is possible where a matrix is stored row by row of its outputs and the graph
transposes it, as in linked bundles; ``weights.bin`` of copied ones holds them transposed already, so each stays by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ..runtime.bundle import Bundle
from ..runtime.errors import BundleIntegrityError
from ..runtime.weight_inputs import WeightInput, WeightPiece

_DTYPES = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.FLOAT: "float32"}


class WeightStreamer:
    """Rewrites the graphs of one bundle. ``inputs``: all weight inputs so far; equal weights of several graphs are one input."""

    def __init__(self, bundle: Bundle, *, merge: bool = True) -> None:
        self._bundle = bundle
        self._merge = merge
        self._by_pieces: dict[tuple[WeightPiece, ...], WeightInput] = {}

    @property
    def inputs(self) -> tuple[WeightInput, ...]:
        """In the order in which the graphs name them."""
        return tuple(self._by_pieces.values())

    def stream(self, graph: str) -> onnx.ModelProto:
        """The graph ``graph`` of the bundle with its matrices as inputs and nothing left in other files.

        Raises:
            BundleIntegrityError: external data that isn't inside a file of the bundle.
        """
        path = self._bundle.path(graph)
        model = onnx.load(path, load_external_data=False)
        matrices: dict[str, tuple[onnx.TensorProto, WeightPiece]] = {}
        for tensor in list(model.graph.initializer):
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            piece = self._piece(graph, tensor)
            if len(tensor.dims) >= 2 and tensor.data_type in _DTYPES:
                matrices[tensor.name] = (tensor, piece)
                model.graph.initializer.remove(tensor)
            else:
                self._embed(tensor, piece)
        merged = _merge(model.graph, {name: tensor for name, (tensor, _) in matrices.items()}) if self._merge else []
        for names in merged:
            self._add(model.graph, "+".join(names), [matrices.pop(name) for name in names])
        for name, found in matrices.items():
            self._add(model.graph, name, [found])
        return model

    def _piece(self, graph: str, tensor: onnx.TensorProto) -> WeightPiece:
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = (Path(graph).parent / place["location"]).as_posix()
        size = self._bundle.path(name).stat().st_size  # refuses what leads out of the bundle
        offset = int(place.get("offset", 0))
        nbytes = int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if name not in self._bundle.manifest.files or not 0 <= offset <= size - nbytes or int(place.get("length", nbytes)) != nbytes:
            raise BundleIntegrityError(
                f"{tensor.name} in {graph} should lie at bytes {offset} to {offset + nbytes} of {name}, which has {size}",
                hint="export the bundle again",
            )
        return WeightPiece(name, offset, nbytes)

    def _embed(self, tensor: onnx.TensorProto, piece: WeightPiece) -> None:
        with self._bundle.path(piece.file).open("rb") as file:
            file.seek(piece.offset)
            tensor.raw_data = file.read(piece.nbytes)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT

    def _add(self, graph: onnx.GraphProto, name: str, parts: list[tuple[onnx.TensorProto, WeightPiece]]) -> None:
        """Declare the input ``name``, under the name that its pieces have already if another graph brought them."""
        first = parts[0][0]
        pieces = tuple(piece for _, piece in parts)
        shape = (sum(tensor.dims[0] for tensor, _ in parts), *first.dims[1:])
        known = self._by_pieces.get(pieces)
        if known is None or known.shape != shape:
            taken = {weight.name for weight in self._by_pieces.values()}
            own = next(each for each in (name, *(f"{name}/{number}" for number in range(2, len(taken) + 3))) if each not in taken)
            known = self._by_pieces[pieces] = WeightInput(own, _DTYPES[first.data_type], shape, pieces)
        graph.input.append(helper.make_tensor_value_info(known.name, first.data_type, shape))
        for node in graph.node if known.name != name else ():
            node.input[:] = [known.name if each == name else each for each in node.input]


def _merge(graph: onnx.GraphProto, matrices: dict[str, onnx.TensorProto]) -> list[tuple[str, ...]]:
    """Replace the products of one value with several transposed matrices by one product and a split.

    Returns the names that became one input, in the order of their rows; the input is named with ``+`` between them.
    """
    uses: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            uses[name] += 1
    transposes = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in matrices and _permutation(node) == [1, 0] and uses[node.input[0]] == 1
    }
    groups: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposes and uses[node.input[1]] == 1:
            groups[node.input[0]].append(node)
    merged = []
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for value, products in groups.items():
        if len(products) < 2:
            continue
        names = tuple(transposes[product.input[1]].input[0] for product in products)
        if len({matrices[name].data_type for name in names}) > 1:
            continue
        merged.append(names)
        rows = [int(matrices[name].dims[0]) for name in names]
        joined = "+".join(names)
        replaced[products[0].output[0]] = [
            helper.make_node("Transpose", [joined], [f"{joined}/transposed"], name=f"{joined}/Transpose", perm=[1, 0]),
            helper.make_node("MatMul", [value, f"{joined}/transposed"], [f"{joined}/product"], name=f"{joined}/MatMul"),
            helper.make_node(
                "Split",
                [f"{joined}/product", f"{joined}/rows"],
                [product.output[0] for product in products],
                name=f"{joined}/Split",
                axis=-1,
            ),
        ]
        graph.initializer.append(helper.make_tensor(f"{joined}/rows", onnx.TensorProto.INT64, [len(rows)], rows))
        for product in products:
            replaced.setdefault(product.output[0], [])
            replaced.setdefault(product.input[1], [])  # its transpose
    if replaced:
        nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
        del graph.node[:]
        graph.node.extend(nodes)
    return merged


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [1, 0])


def weight_arrays(bundle: Bundle, inputs: Iterable[WeightInput]) -> dict[str, np.ndarray]:
    """What a program binds to the inputs: their pieces read from the bundle's files, one after another."""
    arrays = {}
    for weight in inputs:
        data = bytearray()
        for piece in weight.pieces:
            with bundle.path(piece.file).open("rb") as file:
                file.seek(piece.offset)
                data += file.read(piece.nbytes)
        arrays[weight.name] = np.frombuffer(data, weight.dtype).reshape(weight.shape)
    return arrays
