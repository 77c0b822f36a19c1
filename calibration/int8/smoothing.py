"""Finds SmoothQuant's factors: an activation's channels are divided by them, its readers' weights multiplied.

The factor of channel j (G. Xiao et al., arXiv 2211.10438, equation 4)::

    s_j = |x_j|^α / max|w_j|^(1 − α)

|x_j| depends on the grid. With one scale for the whole activation it is the largest magnitude ever seen, as in the paper. If
every row has scales of its own, a channel that is huge in one row harms no other: then |x_j| is the root mean square of the
channel's share in a row. One α suits no two layers alike. So every activation gets its own, by the error of its matmuls on rows
that were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ...runtime.files.scales_file import BLOCK, GRIDS, LEVELS, Smoothing

ALPHAS = (None, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The search tries these; None leaves the activation as it is."""
_FLOOR = 1e-5  # share of the largest channel; a channel below it gets no factor of its own

Weights = Callable[[], Iterable[np.ndarray]]
"""Yields all weights that read an activation, as blocks [C, outputs], from the beginning."""
Heads = tuple[int, int]
"""Counts heads of values, and query heads that share each of them."""


def smoothing_factors(maxima: np.ndarray, weight_maxima: np.ndarray, alpha: float) -> np.ndarray:
    """Compute factors float32 [C], of geometric mean 1, from the largest magnitudes [C] of an activation and of its weights.

    A channel where either is zero has factor 1: it doesn't show what it may hold elsewhere.
    """
    alive = (maxima > 0) & (weight_maxima > 0)
    result = np.ones(len(maxima))
    if alive.any():
        x, w = (np.maximum(each[alive].astype(np.float64), _FLOOR * float(each.max())) for each in (maxima, weight_maxima))
        logs = alpha * np.log(x) - (1 - alpha) * np.log(w)
        result[alive] = np.exp(logs - logs.mean())
    return result.astype(np.float32)


def choose_smoothing(
    rows: np.ndarray, maxima: np.ndarray, weights: Weights, alphas: Sequence[float | None] = ALPHAS, heads: Heads | None = None
) -> dict[str, Smoothing]:
    """Choose the smoothing of least error among ``alphas`` for each grid.

    ``rows`` [R, C]: of an activation that reaches ``maxima`` [C]. ``heads``: given if attention makes the activation. The CPU
    graph can't take its factors, so the grid ``block`` has none then. Memory: a quantised copy of the rows for each alpha and
    grid, and one block of the weights at a time.
    """
    x = rows.astype(np.float32)
    weight_maxima = np.max([np.abs(block).max(1) for block in weights()], 0).astype(np.float32)
    magnitudes = {"block": _typical(x), "tensor": maxima}
    if heads is not None:
        weight_maxima, magnitudes["tensor"] = (_largest_of_sharing(each, heads) for each in (weight_maxima, maxima))
    tried = {"block": alphas if heads is None else [None], "tensor": alphas}
    factors = {
        (grid, alpha): _factors(magnitudes[grid], weight_maxima, alpha)
        for grid in GRIDS
        for alpha in dict.fromkeys([None, *tried[grid]])
    }
    errors = _matmul_errors(x, maxima, weights, factors)
    result = {}
    for grid in GRIDS:
        best = min(tried[grid], key=lambda alpha: errors[grid, alpha])
        result[grid] = Smoothing(best, errors[grid, best], errors[grid, None], factors[grid, best])
    return result


def _largest_of_sharing(channels: np.ndarray, heads: Heads) -> np.ndarray:
    """Take the largest of magnitudes [C] among the query heads that share their values: they have one factor."""
    values, sharing = heads
    grouped = channels.reshape(values, sharing, -1)
    return np.broadcast_to(grouped.max(1, keepdims=True), grouped.shape).reshape(-1)


def _factors(maxima: np.ndarray, weight_maxima: np.ndarray, alpha: float | None) -> np.ndarray:
    return np.ones(len(maxima), np.float32) if alpha is None else smoothing_factors(maxima, weight_maxima, alpha)


def _typical(x: np.ndarray) -> np.ndarray:
    """Compute the root mean square [C] over rows that are brought to one norm."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    result: np.ndarray = np.sqrt(np.square(x / np.where(norms > 0, norms, 1)).mean(0))
    return result


def _matmul_errors(
    x: np.ndarray, maxima: np.ndarray, weights: Weights, factors: Mapping[tuple[str, float | None], np.ndarray]
) -> dict[tuple[str, float | None], float]:
    """Compute the mean over rows of ‖y − y_int8‖² / ‖y‖² by grid and alpha. y: the results of all matmuls of a row."""
    int8_rows = {key: _int8_rows(x / s, float((maxima / s).max()), key[0]) for key, s in factors.items()}
    squares = np.zeros(len(x))
    lost = {key: np.zeros(len(x)) for key in int8_rows}
    for block in weights():
        w = block.astype(np.float32)
        y = x @ w
        squares += np.square(y, dtype=np.float64).sum(1)
        for key, s in factors.items():
            quantised = int8_rows[key] @ _int8_weights(w * s[:, None], key[0])
            lost[key] += np.square(y - quantised, dtype=np.float64).sum(1)
    return {key: float(np.mean(error / np.where(squares > 0, squares, 1))) for key, error in lost.items()}


def _int8_rows(x: np.ndarray, largest: float, grid: str) -> np.ndarray:
    """Round rows [R, C] to int8: with a scale for every block of a row, or with one for ``largest``."""
    if grid == "block":
        return _in_blocks(x, 1)
    return _rounded(x, np.float32(largest / LEVELS))


def _int8_weights(w: np.ndarray, grid: str) -> np.ndarray:
    """Round weights [C, outputs] to int8: with a scale for every block of an output, or for every output."""
    if grid == "block":
        return _in_blocks(w, 0)
    return _rounded(w, np.abs(w).max(0) / np.float32(LEVELS))


def _in_blocks(values: np.ndarray, axis: int) -> np.ndarray:
    """Round a matrix with a scale for every ``BLOCK`` values along ``axis``. The last block may be shorter."""
    length = values.shape[axis]
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, -length % BLOCK)
    padded = np.pad(values, padding) if length % BLOCK else values
    shape = list(padded.shape)
    shape[axis : axis + 1] = [-1, BLOCK]
    blocks = padded.reshape(shape)
    rounded = _rounded(blocks, np.abs(blocks).max(axis + 1, keepdims=True) / np.float32(LEVELS)).reshape(padded.shape)
    return rounded[:length] if axis == 0 else rounded[:, :length]


def _rounded(values: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """Round values to whole steps of ``scale``, at most 127 of them either way; to 0 where the scale is 0."""
    step = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    steps = values / step
    np.rint(steps, out=steps)
    np.clip(steps, -LEVELS, LEVELS, out=steps)
    steps *= step
    return steps
