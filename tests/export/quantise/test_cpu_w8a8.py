"""Products of the CPU graph in 8-bit integers: which products they replace, and what they compute."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir

from medusa_deploy.calibration.int8.matmuls import StepGraph
from medusa_deploy.calibration.int8.takers import smoothable
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.passes.matmuls import find_matmuls
from medusa_deploy.export.quantise.cpu import CpuPrecision, CpuReport, quantise_cpu
from medusa_deploy.export.quantise.w8a8 import LARGEST_ERROR
from medusa_deploy.export.variant import add_variant
from medusa_deploy.export.weights import read_graph
from medusa_deploy.runtime.executors import ort_base
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.heads_file import write_heads
from medusa_deploy.runtime.files.scales_file import ActivationScale, Layer, Scales, Smoothing
from medusa_deploy.runtime.request import Request
from medusa_deploy.runtime.session import load
from medusa_deploy.tools.measure.kl import Divergence
from medusa_deploy.tools.prompt_source import random_prompts
from support.graphs import opened
from support.tiny import VOCAB, random_heads

PROMPTS = random_prompts(VOCAB, 256, 3, seed=5)
SMALL, LARGE = LARGEST_ERROR / 2, LARGEST_ERROR * 2
RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def pruned_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose heads have a projection of their own."""
    folder = tmp_path_factory.mktemp("pruned")
    write_heads(random_heads("grounded", 1, "pruned"), folder / "heads")
    export_bundle(tiny_model, folder / "heads", folder / "bundle", capacity=256, batch=4, top_k=4, max_rows=16, prefill_chunk=16)
    return folder / "bundle"


@pytest.fixture
def pruned_copy(pruned_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned_bundle, tmp_path / "bundle"))


def scales_with(bundle: Path, error: float, *, takers: bool = True, factors: bool = True) -> Scales:
    """Scales of a bundle for activations up to 4, with factors close to 1 and this error."""
    standard = StepGraph(open_bundle(bundle))
    rng = np.random.default_rng(3)
    layers, activations, smoothing = {}, {}, {}
    for product in standard.matmuls:
        layers[product.name] = Layer(product.activation, product.weight, product.axis)
        ones = np.ones(product.channels, np.float32)
        made = np.exp(0.1 * rng.normal(size=product.channels)).astype(np.float32) if factors else ones
        activations[product.activation] = ActivationScale(4 / 127, 4.0, 200, 0.0, 0.1, 0.01, 4 * ones)
        entry = Smoothing(0.5 if factors else None, error, error, made)
        smoothing[product.activation] = {"block": entry, "tensor": entry}
    found = {name: each.taker for name, each in smoothable(standard).items()} if takers else {}
    return Scales("max", layers, activations, {}, {}, smoothing, found)


def quantised(bundle: Path, scales: Scales | None, **settings: Any) -> tuple[Any, CpuReport]:
    model = read_graph(bundle / "onnx" / "step.cpu.onnx")
    return model, quantise_cpu(model, CpuPrecision(**settings), scales)


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))


def products_of_norms(bundle: Path) -> set[str]:
    """Names of the products of queries, keys and values, gates and ups."""
    products = find_matmuls(read_graph(bundle / "onnx" / "step.cpu.onnx"))
    of_norms = (each for each in products if each.activation.producer().op_type.endswith("LayerNormalization"))
    return {each.name for each in of_norms if each.layer is not None}


def the_projection(bundle: Path) -> str:
    [projection] = [each for each in find_matmuls(read_graph(bundle / "onnx" / "step.cpu.onnx")) if each.is_projection]
    return projection.name


def test_products_of_norms_are_in_integers_where_the_error_is_small(pruned_bundle: Path):
    model, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL))
    assert set(report.integers) == {*products_of_norms(pruned_bundle), the_projection(pruned_bundle)}
    found = operators(model)
    assert found["MatMulIntegerToFloat"] == len(report.integers) >= 5 == found["QuantizeLinear"]
    assert report.after < 0.35 * report.before


def test_where_no_factors_are_needed_nothing_has_to_take_them(pruned_bundle: Path):
    _, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL, factors=False))
    assert set(report.integers) == {*products_of_norms(pruned_bundle), the_projection(pruned_bundle)} and report.smoothed == 0


@pytest.mark.parametrize(
    ("error", "takers", "settings"),
    [(LARGE, True, {}), (SMALL, False, {}), (SMALL, True, {"layers": 4})],
)
def test_products_of_layers_have_blocks_where_they_have_4_bits_or_the_error_is_large(
    error: float, takers: bool, settings: dict[str, Any], pruned_bundle: Path
):
    _, report = quantised(pruned_bundle, scales_with(pruned_bundle, error, takers=takers), **settings)
    assert report.integers == [the_projection(pruned_bundle)]


@pytest.mark.parametrize("settings", [{"block": 64}, {"layers": 4, "projection": 4}])
def test_all_products_have_blocks_where_that_is_said(settings: dict[str, Any], pruned_bundle: Path):
    model, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL), **settings)
    assert not report.integers and not operators(model)["MatMulIntegerToFloat"]


def test_a_projection_whose_logits_are_not_computed_again_has_blocks(pruned_bundle: Path):
    _, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL), rescored=0)
    assert set(report.integers) == products_of_norms(pruned_bundle)


def test_a_projection_that_heads_share_has_blocks_as_theirs_has(tiny_bundle: Path):
    _, report = quantised(tiny_bundle, scales_with(tiny_bundle, SMALL))
    assert set(report.integers) == products_of_norms(tiny_bundle)


def test_a_product_that_is_kept_keeps_those_beside_it_out_of_integers(pruned_bundle: Path):
    products = [each for each in find_matmuls(read_graph(pruned_bundle / "onnx" / "step.cpu.onnx")) if each.layer == 1]
    one = next(each for each in products if each.name in products_of_norms(pruned_bundle))
    _, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL), kept={one.name: 32})
    beside = {each.name for each in products if each.activation.name == one.activation.name}
    assert report.bits[one.name] == 32
    assert set(report.integers) == {*products_of_norms(pruned_bundle), the_projection(pruned_bundle)} - beside


def test_the_graph_stays_close_to_the_unquantised_one(pruned_bundle: Path):
    divergence = Divergence(load(pruned_bundle, variant="cpu", threads=1), PROMPTS, 12, threads=1)
    model, report = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL))
    assert report.integers
    assert 0 < divergence.of(model)[0] < 5e-3


def test_a_token_has_the_same_numbers_whatever_tokens_are_beside_it(pruned_bundle: Path):
    model, _ = quantised(pruned_bundle, scales_with(pruned_bundle, SMALL))
    node = next(node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    _, weight, scale, factors, middle = node.inputs
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    inputs, outputs = weight.const_value.shape
    arrays = {each.name: each.const_value.numpy() for each in (weight, scale, factors, middle)}
    graph = make.make_graph(
        [
            make.make_node("QuantizeLinear", ["x", scale.name, middle.name], ["rounded"]),
            make.make_node("MatMulIntegerToFloat", ["rounded", *arrays], ["y"], domain="com.microsoft"),
        ],
        "one",
        [make.make_tensor_value_info("x", float32, ["rows", inputs])],
        [make.make_tensor_value_info("y", float32, ["rows", outputs])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [make.make_opsetid("", 21), make.make_opsetid("com.microsoft", 1)]
    session = opened(ir.from_proto(make.make_model(graph, opset_imports=opsets, ir_version=10)))
    x = RNG.normal(size=(70, int(inputs))).astype(np.float32)
    [together] = session.run(None, {"x": x})
    for count in (1, 2, 5, 17):
        for at in range(0, 70 - count, 13):
            [alone] = session.run(None, {"x": x[at : at + count]})
            assert np.array_equal(alone, together[at : at + count])
    exact = x.astype(np.float64) @ (arrays[weight.name] * arrays[factors.name])
    assert (np.linalg.norm(together - exact, axis=1) < 0.02 * np.linalg.norm(exact, axis=1)).all()


def add(folder: Path) -> Path:
    """Add the variant cpu-int8, with products in integers."""
    model, report = quantised(folder, scales_with(folder, SMALL))
    assert report.integers
    add_variant(open_bundle(folder), "cpu-int8", model, {"plain_step_bytes": report.plain})
    return folder


def test_requests_in_one_step_get_the_tokens_that_they_get_alone(pruned_copy: Path):
    alone = load(add(pruned_copy), variant="cpu-int8", threads=1, prefix_cache=False)
    expected = [alone.generate(token_ids=prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]
    session = load(pruned_copy, variant="cpu-int8", threads=1, slots=3, prefix_cache=False)
    requests = [Request(token_ids=tuple(prompt), max_new_tokens=12) for prompt in PROMPTS]
    answers = dict(session.generate_many(requests))
    assert [answers[index].token_ids for index in range(len(PROMPTS))] == expected


def test_processors_without_vnni_get_kernels_that_do_not_overflow(pruned_copy: Path, monkeypatch: pytest.MonkeyPatch):
    expected = load(add(pruned_copy), variant="cpu-int8", threads=1).generate(token_ids=PROMPTS[0], max_new_tokens=12)
    monkeypatch.setattr(ort_base, "has_vnni", lambda: False)
    session = load(pruned_copy, variant="cpu-int8", threads=1)
    options = session.executor._session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert session.generate(token_ids=PROMPTS[0], max_new_tokens=12).token_ids == expected.token_ids
