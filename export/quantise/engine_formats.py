"""Stores a matrix as engines read it: codes and scales for a standard DequantizeLinear, in int8, int4 or fp8.

=====  ==============  =================================================  ==========================
name   codes           scales                                             GPUs of TensorRT-RTX 1.7.1
=====  ==============  =================================================  ==========================
int8   −127 … 127      one an output                                      sm_75 and newer
int4   −8 … 7          one for every block of an output's inputs          sm_80 and newer
fp8    E4M3, ±448      one for the matrix                                 sm_89 and newer
=====  ==============  =================================================  ==========================

All are symmetric, with positive scales of the matrix's own type. Values are computed when they are saved, one matrix at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from ...runtime.errors import QuantisationError
from .blocks import Grid, Moments, compensated, nearest, positive_grid, rescaled, taken_back

_T = TypeVar("_T")
FORMATS = ("int8", "int4", "fp8")
BLOCKS = (32, 64, 128)
DEFAULT_BLOCK = 64
LARGEST = 127
LARGEST_FP8 = 448.0
_BLOCK = 1 << 22  # elements that are worked on at a time
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Says how int4 and fp8 round: ``block`` inputs share a scale in int4.

    ``moments(weight)``: E[xᵀx] of what a weight, by the name it was exported with, multiplies (:data:`.blocks.Moments`), or
    None. With them GPTQ rounds, without them each value goes to the nearest.
    """

    block: int = DEFAULT_BLOCK
    moments: Callable[[str], Moments | None] = lambda _weight: None

    def block_of(self, inputs: int) -> int | None:
        """Return the largest block up to ``block`` that divides ``inputs``; None if none does."""
        return max((each for each in BLOCKS if each <= self.block and inputs % each == 0), default=None)


NEAREST = Rounding()


class Stored:
    """Codes and scales of one matrix, which stands ``[out, in]`` (axis 0) or ``[in, out]`` (axis 1)."""

    dtype: ir.DataType

    def __init__(self, tensor: ir.TensorProtocol, axis: int) -> None:
        self.tensor, self.axis = tensor, axis
        self.shape = tuple(int(size) for size in tensor.shape.numpy())

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales."""
        raise NotImplementedError

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of the DequantizeLinear."""
        return {}

    def scales(self) -> np.ndarray:
        """Compute the scales, in the matrix's type; NaN and infinity are a QuantisationError."""
        raise NotImplementedError

    def codes(self) -> np.ndarray:
        """Compute the codes, in the matrix's shape."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        size = int(np.prod(self.shape))
        codes = -(-size // 2) if self.dtype == ir.DataType.INT4 else size
        return codes + int(np.prod(self.scale_shape)) * np.dtype(self.tensor.dtype.numpy()).itemsize

    def _of_matrix(self, work: Callable[[np.ndarray], _T]) -> _T:
        """Return ``work`` of the matrix, and unmap its file behind it."""
        try:
            return work(self.tensor.numpy())
        except QuantisationError as error:
            raise QuantisationError(f"the weight {self.tensor.name}: {error.message}", hint=error.hint) from None
        finally:
            release(self.tensor)


class Int8(Stored):
    """An output channel has one scale."""

    dtype = ir.DataType.INT8

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One an output."""
        return (self.shape[self.axis],)

    @property
    def attributes(self) -> dict[str, int]:
        """The axis of outputs."""
        return {"axis": self.axis}

    def scales(self) -> np.ndarray:
        """See :func:`channel_scales`."""
        return self._of_matrix(lambda matrix: channel_scales(matrix, self.axis))

    def codes(self) -> np.ndarray:
        """See :func:`quantised`."""
        scales = self.scales()
        return self._of_matrix(lambda matrix: quantised(matrix, scales, self.axis))


class Int4(Stored):
    """``block`` inputs of an output share a scale."""

    dtype = ir.DataType.INT4

    def __init__(self, tensor: ir.TensorProtocol, axis: int, block: int, moments: Callable[[], Moments | None]) -> None:
        super().__init__(tensor, axis)
        self.block, self._moments = block, moments

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One a block of inputs."""
        return tuple(size if axis == self.axis else size // self.block for axis, size in enumerate(self.shape))

    @property
    def attributes(self) -> dict[str, int]:
        """The axis of inputs, which are cut into blocks."""
        return {"axis": 1 - self.axis, "block_size": self.block}

    def scales(self) -> np.ndarray:
        """Choose scales of least squared error, weighed by E[x²] where that is known."""
        scales = self._grid.scales if self.axis == 0 else self._grid.scales.T
        return np.ascontiguousarray(scales, self.tensor.dtype.numpy())

    def codes(self) -> np.ndarray:
        """Round by GPTQ, or each value to the nearest."""
        import ml_dtypes

        grid, moments = self._grid, self._moments()
        weight = self._of_matrix(partial(_by_output, axis=self.axis))
        codes = nearest(weight, grid) if moments is None else compensated(weight, grid, moments, largest_first=True)
        whole = codes.reshape(len(codes), -1).astype(np.int8) - np.int8(8)
        return np.ascontiguousarray(whole if self.axis == 0 else whole.T).astype(ml_dtypes.int4)

    @cached_property
    def _grid(self) -> Grid:
        moments = self._moments()
        importance = None if moments is None else np.concatenate([np.diag(tile) for tile in moments])
        weight = self._of_matrix(partial(_by_output, axis=self.axis))
        step = max(1, _BLOCK // weight.shape[1])
        grids = [positive_grid(weight[at : at + step], self.block, importance) for at in range(0, len(weight), step)]
        return Grid(4, *(np.concatenate([getattr(grid, name) for grid in grids]) for name in ("scales", "zero_points")))


class Fp8(Stored):
    """The matrix has one scale: a number keeps three bits behind its first one, wherever it lies between 2⁻⁶ and 448 scales."""

    dtype = ir.DataType.FLOAT8E4M3FN

    def __init__(self, tensor: ir.TensorProtocol, axis: int, moments: Callable[[], Moments | None]) -> None:
        super().__init__(tensor, axis)
        self._moments = moments

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One."""
        return ()

    def scales(self) -> np.ndarray:
        """Put the largest magnitude on 448."""
        largest = float(self._of_matrix(partial(_largest, axis=self.axis)).max(initial=0))
        return _rounded_up(np.float32(largest / LARGEST_FP8 if largest else 1.0), self.tensor.dtype.numpy())

    def codes(self) -> np.ndarray:
        """Round by GPTQ, or each value to the nearest."""
        scale, moments = self.scales().astype(np.float32), self._moments()
        if moments is None:
            return self._of_matrix(lambda matrix: _by_pieces(matrix, self.shape, scale))
        weight = self._of_matrix(partial(_by_output, axis=self.axis))

        def rounded(column: np.ndarray, _at: int) -> np.ndarray:
            return _to_fp8(column / scale).astype(np.float64) * scale

        found = taken_back(weight, rounded, moments, largest_first=True)
        return _by_pieces(found if self.axis == 0 else found.T, self.shape, scale)


def _by_pieces(values: np.ndarray, shape: tuple[int, ...], scale: np.ndarray) -> np.ndarray:
    """Round to fp8, a few rows at a time."""
    step = max(1, _BLOCK // shape[1])
    pieces = [_to_fp8(values[at : at + step].astype(np.float32) / scale) for at in range(0, shape[0], step)]
    return np.concatenate(pieces)


def _to_fp8(steps: np.ndarray) -> np.ndarray:
    import ml_dtypes

    whole: np.ndarray = np.clip(steps, -LARGEST_FP8, LARGEST_FP8).astype(ml_dtypes.float8_e4m3fn)
    return whole


def stored_as(
    precision: str, tensor: ir.TensorProtocol, axis: int, rounding: Rounding, exported: str, factors: np.ndarray | None
) -> Stored:
    """Choose how a matrix is stored. A matrix that no block divides is int8 instead of int4.

    ``exported``: name that the matrix had before it was smoothed. ``factors`` [in]: what its activation was divided by.
    """

    def moments() -> Moments | None:
        found = rounding.moments(exported)
        return found if found is None or factors is None else rescaled(found, factors)

    if precision == "fp8":
        return Fp8(tensor, axis, moments)
    block = rounding.block_of(int(tensor.shape[1 - axis])) if precision == "int4" else None  # type: ignore[arg-type]
    if block is None:
        return Int8(tensor, axis)
    return Int4(tensor, axis, block, moments)


def channel_scales(weight: np.ndarray, axis: int) -> np.ndarray:
    """Compute the scales [channels] of a matrix whose output channels lie along ``axis``: a channel's largest magnitude / 127.

    Scales have the matrix's type, rounded up, so that nothing is clipped. A channel of zeros gets scale 1 and stays zero.

    Raises:
        QuantisationError: a channel holds NaN or infinity; the message has its index.
    """
    largest = _largest(weight, axis)
    exact = largest / LARGEST
    return np.where(largest == 0, weight.dtype.type(1), _rounded_up(exact, weight.dtype))


def quantised(weight: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """Round a weight to int8, in its shape: each value in whole steps of its channel's scale, −127 to 127."""
    result = np.empty(weight.shape, np.int8)
    start = 0
    for block in _blocks(weight, axis):
        size = block.shape[axis]
        inside = (slice(None),) * axis + (slice(start, start + size),)
        steps = scales[start : start + size].astype(np.float32)
        # A float32 scale isn't rounded up: the largest value may come to lie a hair above 127 steps.
        result[inside] = np.clip(np.rint(block.astype(np.float32) / (steps if axis else steps[:, None])), -LARGEST, LARGEST)
        start += size
    return result


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap the file that a tensor lies in: pages that were read count as this process's memory."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody else reads it, too
            tensor.release()


def _rounded_up(exact: np.ndarray | np.floating, dtype: np.dtype) -> np.ndarray:
    """Round scales to ``dtype`` so that none becomes smaller."""
    scales = np.maximum(exact, _SMALLEST_SCALE).astype(dtype)
    return np.where(scales.astype(np.float32) < exact, np.nextafter(scales, dtype.type(np.inf)), scales)


def _largest(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return the largest magnitude of each output channel; a magnitude that isn't finite is an error."""
    largest = np.concatenate([np.abs(block).max(1 - axis).astype(np.float32) for block in _blocks(weight, axis)])
    broken = np.flatnonzero(~np.isfinite(largest))
    if broken.size:
        raise QuantisationError(
            f"channel {broken[0]} holds NaN or infinity, as do {broken.size - 1} others",
            hint="the checkpoint's weights are broken",
        )
    return largest


def _by_output(weight: np.ndarray, axis: int) -> np.ndarray:
    _largest(weight, axis)
    return np.ascontiguousarray(weight if axis == 0 else weight.T, np.float32)


def _blocks(weight: np.ndarray, axis: int) -> list[np.ndarray]:
    """Cut a weight between channels into views of at most ``_BLOCK`` elements."""
    channels = weight.shape[axis]
    pieces = max(1, -(-weight.size // _BLOCK))
    size = -(-channels // pieces)
    return [weight[(slice(None),) * axis + (slice(start, start + size),)] for start in range(0, channels, size)]
