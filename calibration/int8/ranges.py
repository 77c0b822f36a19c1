"""Chooses the range that int8 covers from the observations of an activation.

Scales are symmetric (zero point 0, the only ones that TensorRT takes): magnitudes up to the range get 127 steps, larger ones are
clipped. The methods disagree on the best range. H. Wu et al., Integer Quantization for Deep Learning Inference (arXiv
2004.09602), section 3.3, compare max, percentile and entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...runtime.arguments import settle
from ...runtime.errors import RangeError, UsageError
from ...runtime.files.scales_file import LEVELS, SMALLEST_SCALE
from ..distributions import kl_divergence
from .observers import RangeObserver, coarser

_FEWEST_BINS = LEVELS + 1  # in fewer bins a step is finer than a bin, which the histogram can't resolve
_CANDIDATES = 96
_ENTROPY_DOUBLINGS = 2  # 8192 bins to 2048, as TensorRT's calibrator has them


@dataclass(frozen=True, slots=True)
class Method:
    """Says how ranges are chosen: a name in ``METHODS``, and the ``percentile`` of magnitudes, in (0, 100], for that method."""

    name: str = "max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        settle(self, {"percentile": (0, 100)})
        if self.name not in METHODS:
            raise UsageError(f"unknown method {self.name!r}", hint=f"one of {', '.join(METHODS)}")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"the percentile is {self.percentile}", hint="a number above 0, at most 100")

    def describe(self) -> str:
        """Return its description in ``scales.json``."""
        return f"percentile {self.percentile:g}" if self.name == "percentile" else self.name


def choose_range(observer: RangeObserver, method: Method) -> float:
    """Choose the largest magnitude that isn't clipped.

    Raises:
        RangeError: all values are zero, or so small that a step of the range isn't a normal float32.
    """
    chosen = min(METHODS[method.name](observer, method), observer.largest) if observer.largest else 0.0
    if chosen / LEVELS < SMALLEST_SCALE:
        what = f"has the range {chosen:.3g}" if chosen else "is zero"
        raise RangeError(
            f"the activation {observer.name} {what} in {observer.rows} rows",
            hint="the layer does next to nothing: give other data or another method, or check the checkpoint's weights",
        )
    return chosen


def _max(observer: RangeObserver, _method: Method) -> float:
    return observer.largest


def _percentile(observer: RangeObserver, method: Method) -> float:
    """Take the upper edge of the bin that the percentile lies in."""
    seen = np.cumsum(observer.counts)
    wanted = method.percentile / 100 * seen[-1]
    return float(np.searchsorted(seen, wanted) + 1) * observer.width


def _mse(observer: RangeObserver, _method: Method) -> float:
    """Take the range of least squared error, among 96 in geometric steps down to 128 bins.

    HistogramCalibrator of NVIDIA's pytorch-quantization does the same with "mse". See also Y. Choukroun et al., Low-bit
    Quantization of Neural Networks for Efficient Inference (arXiv 1902.06822).
    """
    top = _top(observer.counts)
    if top <= _FEWEST_BINS:
        return observer.largest
    edges = np.unique(np.geomspace(_FEWEST_BINS, top, _CANDIDATES).round()) * observer.width
    candidates = [min(float(edge), observer.largest) for edge in edges]
    return min(candidates, key=lambda limit: squared_error(observer, limit))


def _entropy(observer: RangeObserver, _method: Method) -> float:
    """Take the range whose quantised distribution is closest to the original one, by Kullback-Leibler divergence.

    TensorRT's entropy calibrator did the same (S. Migacz, 8-bit Inference with TensorRT, GTC 2017): it compares the clipped
    histogram with its own in 128 levels, for every number of bins from 128 on. A histogram that ends in an empty bin has an
    infinite divergence.
    """
    counts = coarser(observer.counts, _ENTROPY_DOUBLINGS).astype(np.float64)
    width = observer.width * (1 << _ENTROPY_DOUBLINGS)
    top = _top(counts)
    kept = [bins for bins in range(_FEWEST_BINS, top) if counts[bins - 1]]
    return min([top, *kept], key=lambda bins: histogram_divergence(counts, bins)) * width


METHODS: dict[str, Callable[[RangeObserver, Method], float]] = {
    "max": _max,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}


def histogram_divergence(counts: np.ndarray, bins: int) -> float:
    """Compute KL(P‖Q) in nats of a clipped histogram and its quantised form.

    P has the first ``bins`` counts; all others are added to the last of them. Q has the first ``bins`` counts in 128 equal
    levels. A level's mass is spread evenly over those of its bins that hold something. Infinite if Q is 0 where P isn't.
    """
    kept = counts[:bins]
    clipped = kept.copy()
    clipped[-1] += counts[bins:].sum()
    levels = np.arange(bins) * _FEWEST_BINS // bins
    holding = (kept > 0).astype(np.float64)
    mass, members = np.bincount(levels, kept), np.bincount(levels, holding)
    spread = np.where(kept > 0, (mass / np.maximum(members, 1))[levels], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    there = p > 0
    if (q[there] == 0).any():
        return float("inf")
    return float(kl_divergence(np.log(p[there]), np.log(q[there])))


def squared_error(observer: RangeObserver, limit: float) -> float:
    """Sum the squared errors of int8 values up to ``limit``. Every value is taken for the middle of its bin."""
    filled = np.flatnonzero(observer.counts)
    middles = (filled + 0.5) * observer.width
    step = limit / LEVELS
    rounded = np.minimum(np.rint(middles / step), LEVELS) * step
    return float(np.sum(observer.counts[filled] * (middles - rounded) ** 2))


def relative_error(observer: RangeObserver, limit: float) -> float:
    """Compute the rms error of int8 values up to ``limit``, as a share of the values' own rms."""
    filled = np.flatnonzero(observer.counts)
    total = np.sum(observer.counts[filled] * ((filled + 0.5) * observer.width) ** 2)
    return float(np.sqrt(squared_error(observer, limit) / total))


def clipped_share(observer: RangeObserver, limit: float) -> float:
    """Compute the share of the values in bins that begin at ``limit`` or above it; 0 if no value is larger."""
    if limit >= observer.largest:
        return 0.0
    beyond = observer.counts[int(np.ceil(limit / observer.width)) :]
    return float(beyond.sum() / observer.counts.sum())


def zeroed_share(observer: RangeObserver, limit: float) -> float:
    """Compute the share of the values below half a step: their int8 value is 0. Values count as spread evenly over their bin."""
    whole, part = divmod(limit / LEVELS / 2 / observer.width, 1)
    bins = int(whole)
    return float((observer.counts[:bins].sum() + part * observer.counts[bins]) / observer.counts.sum())


def _top(counts: np.ndarray) -> int:
    """Count the bins up to the last one that holds something."""
    return int(np.flatnonzero(counts)[-1]) + 1
