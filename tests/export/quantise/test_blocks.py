"""Weights in blocks: codes are on the grid, and what GPTQ rounds multiplies real inputs better than rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("onnx_ir")

from medusa_deploy.export.quantise.blocks import compensated, make_grid, nearest, packed, values

BLOCK = 16
WEIGHTS = arrays.arrays(
    np.float32, (3, 2 * BLOCK), elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1e-30, -1e-30, 3e38])
)


@given(WEIGHTS, st.sampled_from([4, 8]))
def test_no_value_is_further_from_its_own_than_a_step(weight: np.ndarray, bits: int):
    grid = make_grid(weight, bits, BLOCK)
    codes = nearest(weight, grid)
    assert codes.shape == (3, 2, BLOCK) and codes.max() < 1 << bits
    blocks, back = weight.reshape(3, 2, BLOCK).astype(np.float64), values(codes, grid).reshape(3, 2, BLOCK)
    error = np.abs(back - blocks).max(-1)
    if bits == 8:
        assert (error <= 1.0001 * np.abs(grid.scales)).all(), (
            "a whole step where it is as far from 0 as the furthest, on the other side"
        )
    else:  # ranges that clip the outermost values are allowed where they make the sum of squares smaller
        spread = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
        assert (error <= 0.31 * spread + 1e-30).all()
        whole = np.maximum(spread / 15, 1e-38)
        assert (((back - blocks) ** 2).sum(-1) <= BLOCK * whole**2 + 1e-30).all()


def test_the_value_furthest_from_zero_is_exact_in_8_bits():
    weight = np.random.default_rng(0).normal(size=(5, 4 * BLOCK)).astype(np.float32)
    blocks = weight.reshape(5, 4, BLOCK)
    back = values(nearest(weight, make_grid(weight, 8, BLOCK)), make_grid(weight, 8, BLOCK)).reshape(blocks.shape)
    at = np.abs(blocks).argmax(-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(back, at, -1), np.take_along_axis(blocks, at, -1), rtol=1e-6)


def test_values_of_a_q8_0_file_stay_as_they_are():
    rng = np.random.default_rng(3)
    codes = rng.integers(-126, 127, (5, 4, BLOCK))
    codes[..., 3] = rng.choice([-127, 127], codes.shape[:2])
    steps = np.exp(rng.normal(size=(5, 4, 1))).astype(np.float16).astype(np.float32)
    weight = (codes * steps).astype(np.float32).reshape(5, -1)
    grid = make_grid(weight, 8, BLOCK)
    np.testing.assert_allclose(values(nearest(weight, grid), grid), weight, rtol=1e-6)


def test_4_bit_codes_lie_two_in_a_byte_the_first_one_low():
    assert packed(np.array([[1, 2, 15]]), 4).tolist() == [[0x21, 0x0F]]
    assert packed(np.array([[1, 2, 255]]), 8).tolist() == [[1, 2, 255]]


@pytest.mark.parametrize("bits", [4, 8])
def test_compensated_codes_multiply_correlated_inputs_better(bits: int):
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(400, 4)) @ rng.normal(size=(4, 64)) + 0.1 * rng.normal(size=(400, 64))
    seen, others = mixed[:300].astype(np.float32), mixed[300:].astype(np.float32)
    weight = rng.normal(size=(24, 64)).astype(np.float32)
    grid = make_grid(weight, bits, BLOCK)

    def error(codes: np.ndarray) -> float:
        return float(np.square(others @ (values(codes, grid) - weight).T).mean())

    better, plain = error(compensated(weight, grid, [seen.T @ seen / len(seen)])), error(nearest(weight, grid))
    assert better < 0.5 * plain


def test_inputs_that_never_came_break_nothing():
    weight = np.random.default_rng(2).normal(size=(4, 2 * BLOCK)).astype(np.float32)
    grid = make_grid(weight, 4, BLOCK)
    codes = compensated(weight, grid, [np.zeros((2 * BLOCK, 2 * BLOCK))])
    np.testing.assert_array_equal(codes, nearest(weight, grid))
