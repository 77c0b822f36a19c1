"""Rounds weights to 8 or 4 bits with a scale for every block of inputs, in the layout of com.microsoft.MatMulNBits.

A matrix W [N, K] has N outputs and blocks of ``block`` inputs each::

    8 bits   value = (code − 128) · scale    symmetric; the value furthest from 0 is exact
    4 bits   value = (code − zero) · scale   the zero point is one of the codes 0 … 15
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BITS = (4, 8)
Moments = Sequence[np.ndarray]
"""E[xᵀx] of an activation [.., K]: the square tiles along its diagonal, in order. One tile is the whole matrix."""
_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_SMALLEST_HALF = float(np.finfo(np.float16).smallest_normal)
_SHRUNK = np.linspace(0.7, 1.0, 13)  # tried ranges of a 4-bit block, as shares of the whole range
_DAMPING = 0.01  # share of the mean second moment, as in GPTQ's paper


@dataclass(frozen=True, slots=True)
class GptqMoments:
    """E[xᵀx] of activations by the names of the weights that multiply them, and the hash of the texts they were measured on."""

    means: Mapping[str, Moments]
    data_sha256: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Maps codes to values: (code − zero point) · scale. ``scales`` and ``zero_points`` (codes) are float32 [N, K / block]."""

    bits: int
    scales: np.ndarray
    zero_points: np.ndarray

    @property
    def is_symmetric(self) -> bool:
        """True if every zero point is the middle code. Then none has to be stored."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())


def make_grid(weight: np.ndarray, bits: int, block: int) -> Grid:
    """Choose the grid of float32 W [N, K], K a multiple of ``block``."""
    blocks = weight.reshape(len(weight), -1, block)
    return _symmetric(blocks, bits) if bits == 8 else _asymmetric(blocks, bits)


def positive_grid(weight: np.ndarray, block: int, importance: np.ndarray | None = None) -> Grid:
    """Choose a symmetric 4-bit grid with positive scales, exact in fp16, as TensorRT's blocked DequantizeLinear takes it.

    ``importance`` [K]: weights of the inputs' squared errors, E[x²] for instance. None weighs all alike.
    """
    blocks = weight.reshape(len(weight), -1, block)
    weights = np.ones((1, 1, 1)) if importance is None else importance.reshape(1, -1, block)
    largest = np.abs(blocks).max(-1)
    zeros = np.full(largest.shape, 8, np.float32)
    best, scales = np.full(largest.shape, np.inf), np.ones(largest.shape, np.float32)
    for share in _SHRUNK:
        scale = np.maximum(share * largest / 7, _SMALLEST_HALF).astype(np.float16).astype(np.float32)
        trial = (_codes(blocks, scale[..., None], zeros[..., None], 4) - zeros[..., None]) * scale[..., None]
        error = (np.square(trial - blocks) * weights).sum(-1)
        best, scales = np.where(error < best, error, best), np.where(error < best, scale, scales)
    return Grid(4, scales, zeros)


def rescaled(moments: Moments, factors: np.ndarray) -> list[np.ndarray]:
    """Return the moments of x / factors. ``factors`` [K]."""
    found, at = [], 0
    for tile in moments:
        inside = factors[at : at + len(tile)]
        found.append(tile / np.outer(inside, inside))
        at += len(tile)
    return found


def nearest(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Round each value to the grid on its own. Returns codes uint8 [N, K / block, block]."""
    blocks = weight.reshape(*grid.scales.shape, -1)
    return _codes(blocks, grid.scales[..., None], grid.zero_points[..., None], grid.bits)


def compensated(weight: np.ndarray, grid: Grid, moments: Moments, *, largest_first: bool = False) -> np.ndarray:
    """Round as :func:`nearest` does, but let later inputs take back the error that rounding an input adds to the outputs.

    This is GPTQ (E. Frantar et al., arXiv 2210.17323, algorithm 1), inside each tile of ``moments``. The grid stays that of the
    unchanged weights, so that codes can be made of it alone. ``largest_first``: inputs of large E[x²] are rounded first, so that
    most others can take back their errors.
    """
    block = weight.shape[1] // grid.scales.shape[1]

    def rounded(column: np.ndarray, at: int) -> np.ndarray:
        scale, zero = (part[:, at // block].astype(np.float64) for part in (grid.scales, grid.zero_points))
        return (_codes(column, scale, zero, grid.bits) - zero) * scale

    found = taken_back(weight, rounded, moments, largest_first=largest_first, apart=block)
    return nearest(found, grid)


Round = Callable[[np.ndarray, int], np.ndarray]
"""Rounds the weights [N] of one input, whose number comes second, to values that can be stored."""


def taken_back(
    weight: np.ndarray, rounded: Round, moments: Moments, *, largest_first: bool = False, apart: int = 64
) -> np.ndarray:
    """Round as :func:`compensated` does, to whatever values ``rounded`` gives. Returns them, float64 [N, K].

    ``apart``: inputs whose errors are spread to all others at once; it changes times, not results.
    """
    at, parts = 0, []
    for tile in moments:
        end = at + len(tile)
        order = np.argsort(-np.diag(tile), kind="stable") if largest_first else np.arange(len(tile))
        parts.append(_taken_back(weight[:, at:end], rounded, at, tile, order, apart))
        at = end
    assert at == weight.shape[1], "tiles cover all inputs"
    return np.concatenate(parts, 1)


def _taken_back(
    weight: np.ndarray, rounded: Round, first: int, moments: np.ndarray, order: np.ndarray, apart: int
) -> np.ndarray:
    """Round inputs in ``order``, the first of which has the number ``first``. All arrays but the result are in that order."""
    count, size = weight.shape
    moments = moments[np.ix_(order, order)].astype(np.float64)
    dead = np.diag(moments) <= 0
    moments[dead, dead] = 1.0
    moments[np.diag_indices(size)] += _DAMPING * np.diag(moments).mean()
    spread = np.linalg.cholesky(np.linalg.inv(moments)).T  # upper; row i: how input i's error spreads to those after it
    left = weight[:, order].astype(np.float64)
    result = np.empty((count, size))
    for start in range(0, size, apart):
        end = min(start + apart, size)
        errors = np.empty((count, end - start))
        for index, at in enumerate(range(start, end)):
            result[:, order[at]] = rounded(left[:, at], first + order[at])
            errors[:, index] = (left[:, at] - result[:, order[at]]) / spread[at, at]
            left[:, at + 1 : end] -= errors[:, index, None] * spread[at, at + 1 : end]
        left[:, end:] -= errors @ spread[start:end, end:]
    return result


def values(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """Turn codes back into values, float32 [N, K]."""
    exact: np.ndarray = (codes.astype(np.float32) - grid.zero_points[..., None]) * grid.scales[..., None]
    return exact.reshape(len(codes), -1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into uint8 [..., n · bits / 8]. The first of two 4-bit codes is the low half; an odd count gets a zero more."""
    if bits == 8:
        return codes.astype(np.uint8, copy=False)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    pairs = codes.astype(np.uint8)
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def _symmetric(blocks: np.ndarray, bits: int) -> Grid:
    """Put the value furthest from 0 on code 0 or on the largest code, whichever gives the least squared error.

    There is one code more below the middle than above it, so the first grid is finer. The second is that of GGUF's Q8_0 and
    keeps its values exactly.
    """
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    middle = 1 << (bits - 1)
    zeros = np.full(furthest.shape, middle, np.float32)
    best, scales = np.full(furthest.shape, np.inf), zeros
    for code in (-middle, middle - 1):
        scale = (furthest / code).astype(np.float32)
        scale = np.where(np.abs(scale) < _SMALLEST, np.float32(_SMALLEST), scale)
        trial = (_codes(blocks, scale[..., None], zeros[..., None], bits) - zeros[..., None]) * scale[..., None]
        error = np.square(trial - blocks, dtype=np.float64).sum(-1)
        best, scales = np.where(error < best, error, best), np.where(error < best, scale, scales)
    return Grid(bits, scales, zeros)


def _asymmetric(blocks: np.ndarray, bits: int) -> Grid:
    """Choose the range of least squared error among several between the least and the largest value. Each includes 0."""
    most = (1 << bits) - 1
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    best = np.full(low.shape, np.inf)
    scales, zeros = (np.zeros(low.shape, np.float32) for _ in range(2))
    for share in _SHRUNK:
        scale = np.maximum(share * (high - low) / most, _SMALLEST).astype(np.float32)
        zero = np.clip(np.rint(-share * low / scale), 0, most).astype(np.float32)
        trial = (_codes(blocks, scale[..., None], zero[..., None], bits) - zero[..., None]) * scale[..., None]
        error = np.square(trial - blocks, dtype=np.float64).sum(-1)
        better = error < best
        best, scales, zeros = (np.where(better, *pair) for pair in ((error, best), (scale, scales), (zero, zeros)))
    return Grid(bits, scales, zeros)


def _codes(weight: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int) -> np.ndarray:
    steps: np.ndarray = np.clip(np.rint(weight / scales) + zero_points, 0, (1 << bits) - 1)
    return steps.astype(np.uint8)
