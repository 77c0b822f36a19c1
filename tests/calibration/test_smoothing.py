"""Smoothing factors: the published formula, less error where channels are uneven, the rows and activations that they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from medusa_deploy.calibration.int8.collect import Calibrator
from medusa_deploy.calibration.int8.row_sample import find_smoothing, sample_rows
from medusa_deploy.calibration.int8.smoothing import choose_smoothing, smoothing_factors
from medusa_deploy.calibration.int8.takers import smoothable
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.scales_file import BLOCK
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import VOCAB

CHANNELS = 80  # no multiple of a block
RNG = np.random.default_rng(1)
X = RNG.normal(0, 1, (40, CHANNELS)).astype(np.float32)
X[:, [3, 50]] *= 100
W = [RNG.normal(0, 1, (CHANNELS, outputs)).astype(np.float32) for outputs in (24, 8)]
PROMPTS = random_prompts(VOCAB, 256, 5, seed=2)


@pytest.fixture(scope="module")
def calibrator(tiny_bundle: Path) -> Calibrator:
    return Calibrator(open_bundle(tiny_bundle), threads=1)


def test_factors_are_the_published_ones_with_geometric_mean_1():
    x, w = np.array([1.0, 8.0, 4.0]), np.array([2.0, 0.5, 4.0])
    expected = x**0.25 / w**0.75
    np.testing.assert_allclose(smoothing_factors(x, w, 0.25), expected / expected.prod() ** (1 / 3), rtol=1e-6)


def test_dead_channels_have_factor_1_and_change_no_other():
    x, w = np.array([1.0, 8.0, 0.0, 4.0]), np.array([2.0, 0.5, 1.0, 0.0])
    found = smoothing_factors(x, w, 0.5)
    assert found[2:].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(found[:2], smoothing_factors(x[:2], w[:2], 0.5))
    assert smoothing_factors(np.zeros(2), np.ones(2), 0.5).tolist() == [1.0, 1.0]


def int8(values: np.ndarray, axis: int | None) -> np.ndarray:
    scale = np.abs(values).max(axis, keepdims=True) / 127
    return np.rint(values / scale) * scale


def expected_error(factors: np.ndarray, grid: str) -> float:
    """The matmuls of whole blocks and one that is shorter, one after the other."""
    errors = []
    w = np.hstack(W) * factors[:, None]
    cuts = [slice(at, at + BLOCK) for at in range(0, CHANNELS, BLOCK)] if grid == "block" else [slice(None)]
    largest = X / factors
    rows = np.hstack([int8(largest[:, cut], 1) for cut in cuts]) if grid == "block" else int8(largest, None)
    quantised = rows @ np.vstack([int8(w[cut], 0) for cut in cuts])
    exact = X.astype(np.float64) @ np.hstack(W)
    for y, yq in zip(exact, quantised, strict=True):
        errors.append(((y - yq) ** 2).sum() / (y**2).sum())
    return float(np.mean(errors))


def test_the_error_is_that_of_int8_products_and_the_best_alpha_is_taken():
    maxima = np.abs(X).max(0)
    found = choose_smoothing(X, maxima, lambda: iter(W))
    for grid, entry in found.items():
        assert entry.alpha is not None
        assert entry.error == pytest.approx(expected_error(entry.factors, grid), rel=1e-3)
        assert entry.unsmoothed_error == pytest.approx(expected_error(np.ones(CHANNELS), grid), rel=1e-3)
        for alpha in (0.3, 0.6, 0.9):
            fixed = choose_smoothing(X, maxima, lambda: iter(W), [alpha])[grid]
            assert fixed.alpha == alpha
            assert entry.error <= fixed.error
    assert found["tensor"].error < found["tensor"].unsmoothed_error / 20
    assert found["block"].error < found["block"].unsmoothed_error / 2


def test_where_channels_are_even_nothing_is_smoothed():
    even = np.where(RNG.random((40, 32)) < 0.5, -1, 1).astype(np.float32)
    weight = np.where(RNG.random((32, 8)) < 0.5, -1, 1).astype(np.float32)
    for entry in choose_smoothing(even, np.ones(32, np.float32), lambda: iter([weight])).values():
        assert entry.alpha is None
        assert entry.factors.tolist() == [1.0] * 32


def test_one_factor_serves_the_queries_that_share_their_values_and_the_cpu_graph_has_none():
    channels, maxima = 96, np.abs(RNG.normal(0, 1, 96)).astype(np.float32)  # 2 heads of values, 3 queries each, 16 channels
    maxima[[5, 21]] = 50, 90
    rows = (RNG.normal(0, 0.3, (40, channels)) * maxima).astype(np.float32)
    weight = RNG.normal(0, 1, (channels, 24)).astype(np.float32)
    found = choose_smoothing(rows, np.abs(rows).max(0), lambda: iter([weight]), [0.5], (2, 3))
    grouped = found["tensor"].factors.reshape(2, 3, 16)
    assert (grouped == grouped[:, :1]).all()
    largest, weights = (each.reshape(2, 3, 16).max(1).ravel() for each in (np.abs(rows).max(0), np.abs(weight).max(1)))
    np.testing.assert_allclose(grouped[:, 0].ravel(), smoothing_factors(largest, weights, 0.5), rtol=1e-5)
    assert found["tensor"].error < found["tensor"].unsmoothed_error / 2
    assert found["block"].alpha is None and found["block"].error == found["block"].unsmoothed_error


def test_inputs_of_all_products_of_layers_can_be_smoothed(calibrator: Calibrator):
    per_layer = [[0, 1, 2], [3], [4, 5], [6]]  # q, k, v · o · gate, up · down; neither the projection nor heads
    matmuls = calibrator.matmuls
    expected = {
        matmuls[7 * layer + readers[0]].activation: [
            (matmuls[7 * layer + index].weight, matmuls[7 * layer + index].axis) for index in readers
        ]
        for layer in range(2)
        for readers in per_layer
    }
    found = smoothable(calibrator.graph)
    assert {name: each.readers for name, each in found.items()} == expected
    takers = [found[matmul.activation].taker for matmul in matmuls[:7]]
    assert [taker.kind for taker in takers] == ["norm", "norm", "norm", "values", "norm", "norm", "layer"]
    assert [found[matmul.activation].heads for matmul in matmuls[:7]] == [None, None, None, (2, 2), None, None, None]
    assert [takers[index].name for index in (3, 6)] == [matmuls[2].name, matmuls[5].name], "values; up"


def test_rows_are_few_and_the_same_again_and_the_first_of_every_prompt_is_among_them(calibrator: Calibrator):
    name = calibrator.matmuls[0].activation
    rows = sample_rows(calibrator, [name], PROMPTS, 24)[name]
    assert rows.shape[1] == calibrator.matmuls[0].channels
    assert len(PROMPTS) * 8 < len(rows) <= len(PROMPTS) * 16
    np.testing.assert_array_equal(rows, sample_rows(calibrator, [name], PROMPTS, 24)[name])
    for prompt in PROMPTS:
        (first,) = sample_rows(calibrator, [name], [prompt[:1]], 1)[name]
        assert np.isclose(rows, first, rtol=1e-4, atol=1e-5).all(1).any()


def test_every_activation_that_can_be_smoothed_is_and_none_without_alphas(calibrator: Calibrator):
    seen = calibrator.collect(PROMPTS, 24)
    found = find_smoothing(calibrator, seen, PROMPTS, 24, [None, 0.5])
    assert list(found) == list(smoothable(calibrator.graph))
    for name, grids in found.items():
        assert set(grids) == {"block", "tensor"}
        assert all(len(entry.factors) == len(seen.observers[name].channel_maxima) for entry in grids.values())
    assert find_smoothing(calibrator, seen, PROMPTS, 24, []) == {}
