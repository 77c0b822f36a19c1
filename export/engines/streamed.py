"""Weights as network inputs: an engine that holds none, so that neither the build nor the plan grows with the backbone.

The bundle's graphs keep their weights as initializers. Only what TensorRT parses is rewritten: every matrix that lies in a file
becomes an input, and matrices that one value is multiplied with (queries, keys and values; gate and up; the heads) become one
input whose pieces lie one after another. That needs matrices stored output by output, as checkpoints and so linked bundles
have them; ``weights.bin`` of copied ones holds them transposed, so there each stays by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ...runtime.errors import BundleIntegrityError
from ...runtime.files.bundle import Bundle
from ...runtime.files.weight_inputs import WeightInput, WeightPiece
from .einsum import merged_name, rewrite_products

_DTYPES = {int(onnx.TensorProto.FLOAT16): "float16", int(onnx.TensorProto.FLOAT): "float32"}


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
        groups = rewrite_products(model.graph, {name: tensor for name, (tensor, _) in matrices.items()}, self._merge)
        for names in groups:
            self._add(model.graph, merged_name(names), [matrices.pop(name) for name in names])
        for name, found in matrices.items():
            self._add(model.graph, name, [found])
        return model

    def _piece(self, graph: str, tensor: onnx.TensorProto) -> WeightPiece:
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = (Path(graph).parent / place["location"]).as_posix()
        size = self._bundle.path(name).stat().st_size  # refuses what leads out of the bundle
        offset = int(place.get("offset", 0))
        nbytes = int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        inside = name in self._bundle.manifest.files and 0 <= offset <= size - nbytes
        if not inside or int(place.get("length", nbytes)) != nbytes:
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
        if known.name not in {value.name for value in graph.input}:  # equal tensors of one graph lie in one place
            graph.input.append(helper.make_tensor_value_info(known.name, first.data_type, shape))
        for node in graph.node if known.name != name else ():
            node.input[:] = [known.name if each == name else each for each in node.input]


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
