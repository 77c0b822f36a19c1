"""Observers: exact under merging, bounded, right against what they summarise; ranges: right against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from medusa_deploy.calibration.int8.observers import BINS, RangeObserver, coarser
from medusa_deploy.calibration.int8.ranges import (
    METHODS,
    Method,
    choose_range,
    clipped_share,
    histogram_divergence,
    relative_error,
    squared_error,
    zeroed_share,
)
from medusa_deploy.runtime.errors import RangeError, UsageError

CHANNELS = 3
any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual = st.floats(-1000, 1000, width=32)
batches = st.lists(
    arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.just(CHANNELS)), elements=st.one_of(any_finite, usual)), max_size=5
)


def observed(*batches: np.ndarray, channels: int = CHANNELS) -> RangeObserver:
    observer = RangeObserver("x", channels)
    for batch in batches:
        observer.observe(batch)
    return observer


def state(observer: RangeObserver) -> tuple[object, ...]:
    return observer.exponent, observer.rows, observer.counts.tolist(), observer.channel_maxima.tolist()


@given(one=batches, two=batches)
def test_merging_two_observers_equals_observing_both_data_sets(one: list[np.ndarray], two: list[np.ndarray]):
    merged, other = observed(*one), observed(*two)
    before = state(other)
    merged.merge(other)
    assert state(merged) == state(observed(*one, *two)) == state(observed(*reversed(one + two)))
    assert state(other) == before


@given(batches)
def test_an_observer_counts_every_value_where_it_belongs(seen: list[np.ndarray]):
    observer = observed(*seen)
    values = np.abs(np.concatenate([np.zeros((0, CHANNELS), np.float32), *seen]).astype(np.float64))
    index = np.floor(values / math.ldexp(1.0, observer.exponent)).astype(np.int64)
    assert observer.counts.tolist() == np.bincount(index.ravel(), minlength=BINS).tolist()
    assert observer.counts.size == BINS
    assert observer.channel_maxima.tolist() == values.max(0, initial=0).tolist()
    assert observer.rows == len(values)


def test_the_range_doubles_until_it_reaches_the_largest_value_and_no_further():
    observer = observed(np.float32([[1, 2, 3]]))
    narrow = observer.width
    assert BINS / 2 <= 3 / narrow < BINS
    observer.observe(np.float16([[-1000, 0, 0]]))
    assert BINS / 2 <= 1000 / observer.width < BINS
    assert observer.largest == 1000
    assert observer.counts.sum() == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_channel_and_not_kept(bad: float):
    observer = observed(np.ones((2, CHANNELS), np.float32))
    before = state(observer)
    with pytest.raises(RangeError, match="activation x holds NaN or infinity in channel 1") as caught:
        observer.observe(np.array([[1, bad, 2]], np.float32))
    assert caught.value.hint
    assert state(observer) == before


@given(st.lists(st.integers(0, 9), min_size=16, max_size=16), st.integers(0, 9))
def test_coarser_bins_keep_every_count(counts: list[int], doublings: int):
    found = coarser(np.array(counts), doublings)
    width = min(1 << doublings, 16)
    assert found.tolist() == [sum(counts[i : i + width]) for i in range(0, 16, width)] + [0] * (16 - 16 // width)


def normal(scale: float = 1.0, outlier: float | None = None) -> RangeObserver:
    values = np.random.default_rng(0).normal(0, scale, (4000, CHANNELS)).astype(np.float32)
    if outlier is not None:
        values[0, 0] = outlier
    return observed(values)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("outlier", [None, 9.0, 5000.0])
def test_every_method_finds_a_range_up_to_the_largest_value(name: str, outlier: float | None):
    observer = normal(outlier=outlier)
    assert 0 < choose_range(observer, Method(name)) <= observer.largest
    # Ranges follow a factor of two exactly: bins do.
    assert choose_range(normal(2.0, outlier and 2 * outlier), Method(name)) == pytest.approx(
        2 * choose_range(observer, Method(name)), rel=1e-6
    )


@given(st.lists(usual, min_size=1, max_size=200), st.floats(1, 100))
def test_the_percentile_is_the_samples_own_within_a_bin(values: list[float], percentile: float):
    data = np.float32(values)[:, None]
    observer = observed(data, channels=1)
    if observer.largest < 1e-6:
        return
    found = choose_range(observer, Method("percentile", percentile))
    exact = np.sort(np.abs(data[:, 0]))[math.ceil(percentile / 100 * len(values) - 1e-9) - 1]
    assert exact <= found <= exact + observer.width


def test_mse_beats_the_full_range_where_one_value_lies_far_out():
    observer = normal(outlier=9.0)
    best = choose_range(observer, Method("mse"))
    assert best < 9
    assert squared_error(observer, best) < squared_error(observer, 9.0)
    tried = np.linspace(1, 9, 500)
    assert squared_error(observer, best) <= 1.02 * min(squared_error(observer, float(limit)) for limit in tried)


def test_the_errors_are_those_of_the_values_themselves():
    rng = np.random.default_rng(1)
    values = np.abs(rng.normal(0, 1, 30000)).astype(np.float32)
    observer, limit = observed(values[:, None], channels=1), 2.5
    rounded = np.minimum(np.rint(values / (limit / 127)), 127)
    error = np.sqrt(np.mean((values - rounded * limit / 127) ** 2) / np.mean(values**2))
    assert relative_error(observer, limit) == pytest.approx(error, rel=0.01)
    assert clipped_share(observer, limit) == pytest.approx(np.mean(values > limit), abs=1e-3)
    assert zeroed_share(observer, limit) == pytest.approx(np.mean(rounded == 0), abs=1e-3)


def test_nothing_is_clipped_at_the_largest_value_even_where_a_bin_begins_there():
    observer = observed(np.full((2, CHANNELS), 0.5, np.float32))
    assert (clipped_share(observer, 0.5), clipped_share(observer, 0.4)) == (0, 1)


def slow_kl(counts: list[float], bins: int) -> float:
    """Migacz's pseudo-code, value by value."""
    p = [*counts[: bins - 1], counts[bins - 1] + sum(counts[bins:])]
    groups: dict[int, list[int]] = {}
    for index in range(bins):
        groups.setdefault(index * 128 // bins, []).append(index)
    q = [0.0] * bins
    for members in groups.values():
        filled = [index for index in members if counts[index]]
        for index in filled:
            q[index] = sum(counts[i] for i in members) / len(filled)
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a and not b:
            return math.inf
        if a:
            total += a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    return total


@given(st.lists(st.integers(0, 5), min_size=140, max_size=140), st.integers(128, 140))
def test_the_divergence_is_the_published_one(counts: list[int], bins: int):
    counts[0] += 1
    found = histogram_divergence(np.array(counts, np.float64), bins)
    assert found == pytest.approx(slow_kl([float(count) for count in counts], bins), abs=1e-9)


def test_entropy_clips_a_long_tail_and_keeps_an_even_spread():
    tail = observed(np.random.default_rng(0).normal(0, 1, (10000, CHANNELS)).astype(np.float32) ** 3)
    assert choose_range(tail, Method("entropy")) < 0.8 * tail.largest
    even = observed(np.linspace(0, 1, 30000, dtype=np.float32)[:, None], channels=1)
    assert choose_range(even, Method("entropy")) > 0.9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("value", "what"), [(0.0, "is zero in 2 rows"), (1e-37, "has the range"), (1e-44, "has the range")])
def test_ranges_of_zero_or_too_small_for_a_scale_are_refused(name: str, value: float, what: str):
    observer = observed(np.full((2, CHANNELS), value, np.float32))
    with pytest.raises(RangeError, match=what) as caught:
        choose_range(observer, Method(name))
    assert caught.value.hint


@pytest.mark.parametrize("options", [{"name": "best"}, {"percentile": 0.0}, {"percentile": 100.5}, {"percentile": math.nan}])
def test_methods_that_do_not_exist_are_refused(options: dict[str, object]):
    with pytest.raises(UsageError):
        Method(**options)  # type: ignore[arg-type]
