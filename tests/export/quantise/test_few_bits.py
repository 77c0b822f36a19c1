"""Weights in int4 and fp8: what is stored, what ONNX Runtime computes with it, and what GPTQ and smoothing do to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx import helper, numpy_helper  # noqa: E402

from medusa_deploy.export.engines.options import check_format  # noqa: E402
from medusa_deploy.export.quantise.engine_formats import (  # noqa: E402
    NEAREST,
    Rounding,
    stored_as,
)
from medusa_deploy.export.quantise.engine_weights import quantise_weights, write_quantised  # noqa: E402
from medusa_deploy.export.weights import WeightsFile  # noqa: E402
from medusa_deploy.runtime.errors import QuantisationError, UsageError  # noqa: E402
from medusa_deploy.runtime.files.engine_record import OLDEST_TARGETS  # noqa: E402

RNG = np.random.default_rng(5)
K, N = 128, 160


def graph(matrix: np.ndarray, *, turned: bool) -> onnx.ModelProto:
    """A product in fp16 with ``matrix`` [in, out], stored as it is or turned behind a Transpose."""
    stored = np.ascontiguousarray(matrix.T) if turned else matrix
    nodes = [helper.make_node("MatMul", ["x", "t" if turned else "w"], ["y"], name="product")]
    if turned:
        nodes.insert(0, helper.make_node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]))
    half = onnx.TensorProto.FLOAT16
    values = [helper.make_tensor_value_info(name, half, ["B", size]) for name, size in zip("xy", matrix.shape, strict=True)]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(stored, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    """Executes the very nodes: no product may become one that rounds its activation."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("precision", "nbytes", "most"), [("int4", K * N // 2, 0.12), ("fp8", K * N, 0.03), ("int8", K * N, 0.01)]
)
def test_products_with_few_bits_are_near_the_exact_ones_in_every_layout(
    precision: str, nbytes: int, most: float, turned: bool, tmp_path: Path
) -> None:
    matrix = (RNG.normal(size=(K, N)) * 0.05).astype(np.float16)
    onnx.save(graph(matrix, turned=turned), tmp_path / "fp16.onnx")
    for alike in (False, True):
        with WeightsFile(tmp_path / "few.bin") as file:
            quantise = lambda model: quantise_weights(model, (), {"product": precision})  # noqa: E731
            report = write_quantised(tmp_path / "fp16.onnx", tmp_path / "few.onnx", file, quantise, turned=alike)
        assert report.formats == {precision: 1}
        onnx.checker.check_model(tmp_path / "few.onnx")
        names = [node.op_type for node in ir.load(tmp_path / "few.onnx").graph]
        assert ("Transpose" in names) == (turned and not alike)
        assert (tmp_path / "few.bin").stat().st_size - nbytes in range(66000), "codes, and scales on a page of their own"
        x = RNG.normal(size=(9, K)).astype(np.float16)
        exact = x.astype(np.float64) @ matrix.astype(np.float64)
        found = run(tmp_path / "few.onnx", x)
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert most / 20 < error < most


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 128]), st.sampled_from([0, 1]), st.floats(1e-4, 100))
def test_int4_codes_are_within_a_step_and_scales_are_positive(seed: int, block: int, axis: int, size: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(K, K)) * size).astype(np.float16)
    stored = stored_as("int4", ir.tensor(weight, name="w"), axis, Rounding(block), "w", None)
    codes, scales = stored.codes(), stored.scales()
    assert codes.dtype == ml_dtypes.int4 and codes.shape == weight.shape
    assert scales.dtype == np.float16 and scales.shape == stored.scale_shape
    assert (scales > 0).all()
    steps = np.repeat(scales.astype(np.float64), block, 1 - axis)
    values = codes.astype(np.int8) * steps
    inside = np.abs(weight) <= 7 * steps  # a range may be cut: the squared error of the block decides
    assert (np.abs(values - weight)[inside] <= 0.5001 * steps[inside]).all()
    assert inside.mean() > 0.8


def test_fp8_has_one_scale_and_rounds_to_three_bits() -> None:
    weight = (RNG.normal(size=(K, N)) * 0.02).astype(np.float16)
    stored = stored_as("fp8", ir.tensor(weight, name="w"), 1, NEAREST, "w", None)
    codes, scale = stored.codes(), float(stored.scales())
    assert np.abs(codes.astype(np.float32)).max() <= 448
    large = np.abs(weight) > 2.0**-5 * scale
    values = codes.astype(np.float64) * scale
    assert (np.abs(values - weight)[large] <= np.abs(weight[large].astype(np.float64)) / 15).all()
    zeros = stored_as("fp8", ir.tensor(np.zeros((2, 2), np.float16), name="z"), 0, NEAREST, "z", None)
    assert (zeros.codes().astype(np.float32) == 0).all() and zeros.scales() == 1


def test_gptq_and_factors_lessen_the_error_of_correlated_inputs() -> None:
    mixed = RNG.normal(size=(2000, 40)) @ RNG.normal(size=(40, K)) * np.geomspace(0.1, 10, K)
    weight = RNG.normal(size=(N, K)).astype(np.float16)
    moments = [(mixed.T @ mixed / len(mixed)).astype(np.float32)]

    def fp8_error(rounding: Rounding) -> float:
        stored = stored_as("fp8", ir.tensor(weight, name="w"), 0, rounding, "w", None)
        off = (stored.codes().astype(np.float64) * float(stored.scales()) - weight) @ mixed.T
        return float(np.linalg.norm(off) / np.linalg.norm(weight @ mixed.T))

    def error(rounding: Rounding, factors: np.ndarray | None) -> float:
        scaled = weight if factors is None else (weight * factors).astype(np.float16)
        stored = stored_as("int4", ir.tensor(scaled, name="w/smoothed"), 0, rounding, "w", factors)
        values = stored.codes().astype(np.float64) * np.repeat(stored.scales().astype(np.float64), 64, 1)
        off = (values / (1 if factors is None else factors) - weight) @ mixed.T
        return float(np.linalg.norm(off) / np.linalg.norm(weight @ mixed.T))

    factors = np.sqrt(np.sqrt(np.diag(moments[0])))
    with_moments = Rounding(moments=lambda name: moments if name == "w" else None)
    errors = [error(NEAREST, None), error(NEAREST, factors), error(with_moments, None), error(with_moments, factors)]
    assert errors[3] < errors[2] < errors[0] / 4, errors
    assert fp8_error(with_moments) < fp8_error(NEAREST) / 4


def test_a_matrix_that_no_block_divides_is_int8_and_nan_is_named() -> None:
    assert type(stored_as("int4", ir.tensor(np.ones((48, 8), np.float16)), 1, NEAREST, "w", None)).__name__ == "Int8"
    smaller = stored_as("int4", ir.tensor(np.ones((96, 8), np.float16)), 1, NEAREST, "w", None)
    assert smaller.attributes == {"axis": 0, "block_size": 32}
    broken = np.ones((64, 8), np.float16)
    broken[3, 3] = np.nan
    for precision in ("int4", "fp8", "int8"):
        with pytest.raises(QuantisationError, match=r"the weight w: channel \d+ holds NaN"):
            stored_as(precision, ir.tensor(broken, name="w"), 1, NEAREST, "w", None).codes()


@pytest.mark.parametrize(("precision", "oldest"), OLDEST_TARGETS.items())
def test_a_gpu_without_the_numbers_is_refused_by_name(precision: str, oldest: int) -> None:
    check_format(precision, f"sm_{oldest}")
    check_format(precision, "here")
    with pytest.raises(UsageError, match=f"{precision} needs sm_{oldest} or newer, and sm_70"):
        check_format(precision, "sm_70")
