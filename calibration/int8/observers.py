"""Keeps a histogram of an activation's magnitudes, and the largest magnitude of each channel."""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from ...runtime.errors import RangeError

BINS = 8192
_DOUBLINGS = BINS.bit_length() - 1
_SMALLEST_EXPONENT = -126  # 2^126 is the largest power of two whose inverse is a normal float32, too


class RangeObserver:
    """Counts magnitudes of one activation [..., C], in bounded memory, whatever their range.

    ``counts`` int64 [BINS]: bin i holds magnitudes in [i, i + 1) · 2^``exponent``. The range doubles when a value lies beyond it:
    pairs of bins become one. Widths are powers of two, so bins nest and scaling is exact. The state depends on which values were
    seen, not on their order or grouping: merging observers equals observing everything with one.
    ``channel_maxima`` float32 [C]. ``rows``: number of vectors [C] seen.
    """

    def __init__(self, name: str, channels: int) -> None:
        """Start with nothing seen. ``name``: of the activation, for messages."""
        self.name = name
        self.counts = np.zeros(BINS, np.int64)
        self.exponent = _SMALLEST_EXPONENT
        self.channel_maxima = np.zeros(channels, np.float32)
        self.rows = 0

    @property
    def largest(self) -> float:
        """The largest magnitude, exactly."""
        return float(self.channel_maxima.max())

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def observe(self, values: np.ndarray) -> None:
        """Take in values [..., C] of any float type.

        Raises:
            RangeError: a value is NaN or infinite; none of them is kept.
        """
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1, len(self.channel_maxima))
        if not magnitudes.size:
            return
        maxima = magnitudes.max(0)
        if not np.isfinite(maxima).all():
            channel = int(np.flatnonzero(~np.isfinite(maxima))[0])
            raise RangeError(
                f"the activation {self.name} holds NaN or infinity in channel {channel}",
                hint="check the bundle: medusa-deploy verify BUNDLE; in float16 the values may overflow: export in fp32",
            )
        self._grow(_exponent(float(maxima.max())))
        magnitudes *= np.float32(math.ldexp(1.0, -self.exponent))
        self.counts += np.bincount(magnitudes.ravel().astype(np.int64), minlength=BINS)
        np.maximum(self.channel_maxima, maxima, out=self.channel_maxima)
        self.rows += len(magnitudes)

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        self._grow(other.exponent)
        self.counts += coarser(other.counts, self.exponent - other.exponent)
        np.maximum(self.channel_maxima, other.channel_maxima, out=self.channel_maxima)
        self.rows += other.rows

    def _grow(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent


def coarser(counts: np.ndarray, doublings: int) -> np.ndarray:
    """Join bins of counts [n], n a power of two, into bins 2^``doublings`` times as wide."""
    doublings = min(doublings, len(counts).bit_length() - 1)
    result = np.zeros_like(counts)
    result[: len(counts) >> doublings] = counts.reshape(-1, 1 << doublings).sum(1)
    return result


def _exponent(largest: float) -> int:
    """Find the smallest exponent whose bins reach beyond ``largest``."""
    return max(math.frexp(largest)[1] - _DOUBLINGS, _SMALLEST_EXPONENT) if largest else _SMALLEST_EXPONENT
