"""Rewrites the standard graph in fp16 with weights in 8 bits, for ONNX Runtime's CUDA provider: products become its MatMulNBits.

A DequantizeLinear before a MatMul would write every weight in fp16 in each step and read it again. MatMulNBits reads the codes;
activations stay fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...runtime.errors import BundleExistsError, QuantisationError
from ...runtime.files.bundle import Bundle
from ..passes.matmuls import NUMBERS_AT_A_TIME, Matrix, constant_matrix
from ..passes.patterns import MICROSOFT, new_node, take_place
from ..variant import add_variant
from ..weights import read_graph
from .blocks import Grid, make_grid, nearest
from .engine_formats import release
from .engine_weights import lazy

NAME = "cuda-int8"
BLOCK = 64
"""Inputs that share a scale. CUDA's kernels for several rows take 32, 64 and 128."""
_BITS = 8
_SMALLEST_MATRIX = 1 << 12
_SMALLEST_HALF = np.float32(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class Matrix8:
    """The matrix W [N, K] of one product, and its codes uint8 [N, K / BLOCK, BLOCK] and scales fp16 [N, K / BLOCK]."""

    name: str
    tensor: ir.TensorProtocol
    transposed: bool

    @cached_property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        first, second = (int(size) for size in self.tensor.shape.numpy())
        return (first, second) if self.transposed else (second, first)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.shape[0] * self.shape[1] * (BLOCK + 2) // BLOCK

    def scales(self) -> np.ndarray:
        """Compute the scales."""
        return self._of_rows(lambda rows: self._grid(rows).scales.astype(np.float16))

    def codes(self) -> np.ndarray:
        """Compute the codes."""
        return self._of_rows(lambda rows: nearest(rows, self._grid(rows)))

    def _grid(self, rows: np.ndarray) -> Grid:
        """Choose the grid of some rows, with scales that fp16 holds."""
        grid = make_grid(rows, _BITS, BLOCK)
        largest = np.maximum(np.abs(grid.scales), _SMALLEST_HALF).astype(np.float16)
        return Grid(_BITS, np.copysign(largest.astype(np.float32), grid.scales), grid.zero_points)

    def _of_rows(self, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Join what ``work`` makes of some float32 rows of W at a time; the file that they lie in is unmapped behind it."""
        stored, (outputs, size) = self.tensor.numpy(), self.shape
        rows = stored if self.transposed else stored.T
        step = max(1, NUMBERS_AT_A_TIME // size)
        found = []
        for at in range(0, outputs, step):
            piece = np.ascontiguousarray(rows[at : at + step], np.float32)
            if not np.isfinite(piece).all():
                hint = "the checkpoint's weights are broken"
                raise QuantisationError(f"the weight {self.name} holds NaN or infinity", hint=hint)
            found.append(work(piece))
        del stored, rows
        release(self.tensor)
        return np.concatenate(found)


Store = Callable[[Matrix8], tuple[ir.TensorProtocol, ir.TensorProtocol]]
"""Makes the tensors of codes and scales, in the shapes of :class:`Matrix8`."""


@dataclass(frozen=True, slots=True)
class CudaReport:
    """Counts products in 8 bits, the bytes of their ``weights`` before and after, and the products that stay in fp16."""

    products: int
    before: int
    after: int
    left: int


def quantise_cuda(model: ir.Model, store: Store | None = None) -> CudaReport:
    """Rewrite the products of a standard graph, or of the heads alone, in place. ``store`` None rounds the weights.

    Values are computed when they are saved, one matrix at a time. A matrix that :data:`BLOCK` doesn't divide stays as it is.

    Raises:
        QuantisationError: the graph isn't in fp16, or no product can be in 8 bits.
    """
    graph, store = model.graph, store or _rounded
    made: dict[str, tuple[Matrix8, list[ir.Value]]] = {}
    products, left = 0, 0
    for node in list(graph):
        matrix = constant_matrix(node)
        if matrix is None or node.op_type != "MatMul":
            continue
        found = _matrix8(matrix)
        if found is None:
            left += 1
            continue
        if found.name not in made:
            made[found.name] = found, _values(graph, found, store)
        _multiply(graph, node, found, made[found.name][1])
        products += 1
    if not products:
        raise QuantisationError(
            f"no product of fp16 matrices whose inputs are a multiple of {BLOCK} is in the graph",
            hint="the variant for cuda is made of a bundle in fp16: medusa-deploy export … --dtype fp16",
        )
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1
    matrices = [found for found, _ in made.values()]
    return CudaReport(products, sum(found.tensor.nbytes for found in matrices), sum(found.nbytes for found in matrices), left)


def write_cuda_variant(bundle: Bundle, *, force: bool = False) -> tuple[Bundle, CudaReport]:
    """Add the variant :data:`NAME` to a bundle and return it as it is now. The caller holds the bundle's lock.

    Raises:
        BundleExistsError: the bundle has the variant, and ``force`` is false.
        QuantisationError: see :func:`quantise_cuda`; or a weight holds NaN or infinity.
        OutputError: the file system refused.
    """
    manifest = bundle.manifest
    if NAME in manifest.variants and not force:
        raise BundleExistsError(f"the bundle has a variant {NAME}", hint="replace it with --force")
    model = read_graph(bundle.path(manifest.graph("standard")))
    report = quantise_cuda(model)
    facts = {"bits": _BITS, "block": BLOCK, "products": report.products, "left": report.left}
    return add_variant(bundle, NAME, model, {**facts, "bytes_before": report.before, "bytes_after": report.after}), report


def _matrix8(matrix: Matrix) -> Matrix8 | None:
    value = matrix.parts[0]
    tensor = value.const_value
    if len(matrix.parts) != 1 or tensor is None or tensor.dtype != ir.DataType.FLOAT16 or tensor.size < _SMALLEST_MATRIX:
        return None
    found = Matrix8(str(value.name), tensor, matrix.transposed)
    return found if found.shape[1] % BLOCK == 0 else None


def _rounded(matrix: Matrix8) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    outputs, size = matrix.shape
    parts = []
    kinds = (("codes", matrix.codes, ir.DataType.UINT8, (BLOCK,)), ("scales", matrix.scales, ir.DataType.FLOAT16, ()))
    for part, make, dtype, inner in kinds:
        shape = ir.Shape((outputs, size // BLOCK, *inner))
        parts.append(lazy(ir.Value(name=f"{matrix.name}/{part}"), make, dtype, shape))
    return parts[0], parts[1]


def _values(graph: ir.Graph, matrix: Matrix8, store: Store) -> list[ir.Value]:
    """Add codes and scales to the graph, under the weight's name."""
    values = []
    for part, tensor in zip(("codes", "scales"), store(matrix), strict=True):
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=f"{matrix.name}/{part}", type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        values.append(value)
    return values


def _multiply(graph: ir.Graph, node: ir.Node, matrix: Matrix8, values: list[ir.Value]) -> None:
    """Put MatMulNBits in the place of ``node``."""
    outputs, size = matrix.shape
    attributes = {"K": size, "N": outputs, "bits": _BITS, "block_size": BLOCK}
    made = new_node("MatMulNBits", [node.inputs[0], *values], attributes, str(node.name), domain=MICROSOFT)
    made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, [made])
    take_place(made.outputs[0], node)
