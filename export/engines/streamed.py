"""Weights as network inputs: an engine that holds none, so that neither the build nor the plan grows with the backbone.

The bundle's graphs keep their weights as initializers. Only what TensorRT parses is rewritten: every matrix that lies in a file
becomes an input. Matrices that one value is multiplied with (queries, keys and values; gate and up; the heads) become one input
whose pieces lie one after another. Merging needs matrices stored output by output, as checkpoints and so linked bundles have
them. ``weights.bin`` of copied bundles holds matrices transposed, so there each stays by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ...runtime.errors import BundleIntegrityError
from ...runtime.files.bundle import Bundle
from ...runtime.files.weight_inputs import WeightInput, WeightPiece
from ..weights import read_graph
from .einsum import rewrite_matmuls

_DTYPES = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
}
_SMALLEST_INPUT = 1 << 16  # bytes; scales and small matrices stay in the graph


class WeightStreamer:
    """Rewrites the graphs of one bundle. Equal weights of several graphs become one input."""

    def __init__(self, bundle: Bundle, *, merge: bool = True) -> None:
        self._bundle = bundle
        self._merge = merge
        self._by_pieces: dict[tuple[WeightPiece, ...], WeightInput] = {}

    @property
    def inputs(self) -> tuple[WeightInput, ...]:
        """All inputs, in the order in which the graphs name them."""
        return tuple(self._by_pieces.values())

    def stream(self, graph: str) -> onnx.ModelProto:
        """Read the graph ``graph`` of the bundle and make inputs of its matrices; nothing is left in other files.

        Raises:
            BundleIntegrityError: external data that isn't inside a file of the bundle.
        """
        model = read_graph(self._bundle.path(graph))
        matrices: dict[ir.Value, WeightPiece] = {}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            piece = self._piece(graph, tensor)
            if len(tensor.shape) >= 2 and tensor.dtype in _DTYPES:
                matrices[value] = piece
            else:
                value.const_value = self._embedded(tensor, piece)
        groups = rewrite_matmuls(model.graph, matrices, merge=self._merge)
        for merged, members in groups:
            self._add(model.graph, merged, [matrices[member] for member in members])
        grouped = {member for _merged, members in groups for member in members}
        for value, piece in matrices.items():
            model.graph.initializers.pop(str(value.name))
            if value not in grouped:
                value.const_value = None
                self._add(model.graph, value, [piece])
        return ir.to_proto(model)

    def _piece(self, graph: str, tensor: ir.ExternalTensor) -> WeightPiece:
        name = (Path(graph).parent / tensor.location).as_posix()
        size = self._bundle.path(name).stat().st_size  # refuses what leads out of the bundle
        offset, nbytes = tensor.offset or 0, tensor.nbytes
        inside = name in self._bundle.manifest.files and 0 <= offset <= size - nbytes
        if not inside or tensor.length not in (None, nbytes):
            raise BundleIntegrityError(
                f"{tensor.name} in {graph} should lie at bytes {offset} to {offset + nbytes} of {name}, which has {size}",
                hint="export the bundle again",
            )
        return WeightPiece(name, offset, nbytes)

    def _embedded(self, tensor: ir.ExternalTensor, piece: WeightPiece) -> ir.TensorProtocol:
        data = np.frombuffer(_read(self._bundle, piece), tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        return ir.tensor(data, dtype=tensor.dtype, name=tensor.name)

    def _add(self, graph: ir.Graph, value: ir.Value, parts: Sequence[WeightPiece]) -> None:
        """Make ``value`` an input, under the name that its pieces have already if another graph brought them."""
        assert value.shape is not None and value.dtype is not None
        pieces, shape = tuple(parts), tuple(value.shape.numpy())
        known = self._by_pieces.get(pieces)
        if known is None or known.shape != shape:
            taken = {weight.name for weight in self._by_pieces.values()}
            names = (str(value.name), *(f"{value.name}/{number}" for number in range(2, len(taken) + 3)))
            own = next(each for each in names if each not in taken)
            known = self._by_pieces[pieces] = WeightInput(own, _DTYPES[value.dtype], shape, pieces)
        declared = next((each for each in graph.inputs if each.name == known.name), None)
        if declared is None:
            value.name = known.name
            graph.inputs.append(value)
        else:  # equal tensors of one graph lie in one place
            ir.convenience.replace_all_uses_with(value, declared)


def stream_quantised(*graphs: Path) -> tuple[WeightInput, ...]:
    """Make inputs of the matrices of graphs that :func:`..quantise.engine_weights.write_quantised` wrote, in place.

    The pieces name the weights' file as the graphs do. Scales stay where they are: they are small.
    """
    inputs: dict[tuple[WeightPiece, tuple[int, ...]], WeightInput] = {}
    for path in graphs:
        model = ir.load(path)
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.nbytes < _SMALLEST_INPUT or tensor.dtype not in _DTYPES or len(tensor.shape) < 2:
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
                continue
            piece, shape = WeightPiece(str(tensor.location), tensor.offset or 0, tensor.nbytes), tuple(tensor.shape.numpy())
            taken = {weight.name for weight in inputs.values()}
            name = str(value.name) if str(value.name) not in taken else f"{value.name}/{len(taken)}"
            known = inputs.setdefault((piece, shape), WeightInput(name, _DTYPES[tensor.dtype], shape, (piece,)))
            model.graph.initializers.pop(str(value.name))
            declared = next((each for each in model.graph.inputs if each.name == known.name), None)
            if declared is None:
                value.name, value.const_value = known.name, None
                model.graph.inputs.append(value)
            else:  # equal tensors of one graph lie in one place
                ir.convenience.replace_all_uses_with(value, declared)
        onnx.save(ir.to_proto(model), path)
    return tuple(inputs.values())


def weight_arrays(bundle: Bundle, inputs: Iterable[WeightInput]) -> dict[str, np.ndarray]:
    """Read what a program binds to the inputs: their pieces from the bundle's files, one after another."""
    arrays = {}
    for weight in inputs:
        data = b"".join(_read(bundle, piece) for piece in weight.pieces)
        arrays[weight.name] = np.frombuffer(data, weight.dtype).reshape(weight.shape)
    return arrays


def _read(bundle: Bundle, piece: WeightPiece) -> bytes:
    with bundle.path(piece.file).open("rb") as file:
        file.seek(piece.offset)
        return file.read(piece.nbytes)
