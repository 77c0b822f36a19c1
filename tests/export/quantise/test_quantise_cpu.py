"""The CPU graph in few bits: which products change, that smoothing changes nothing exact, and that logits are computed again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
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
from medusa_deploy.export.passes import matmuls as matmuls_module
from medusa_deploy.export.passes.matmuls import find_matmuls
from medusa_deploy.export.quantise import cpu as quantise_cpu_module
from medusa_deploy.export.quantise.cpu import CpuPrecision, quantise_cpu, take_in
from medusa_deploy.export.quantise.smooth_cpu import smooth
from medusa_deploy.export.quantise.takers import with_takers
from medusa_deploy.export.variant import add_variant, check_variant
from medusa_deploy.export.weights import read_graph
from medusa_deploy.runtime.errors import BundleExistsError, QuantisationError, UsageError
from medusa_deploy.runtime.executors.step_plan import Wanted
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.scales_file import Layer, Scales, Smoothing, Taker
from medusa_deploy.runtime.session import load
from medusa_deploy.tools.measure.kl import Divergence, taken_apart
from medusa_deploy.tools.prompt_source import random_prompts
from support.graphs import opened
from support.plans import prefill
from support.tiny import VOCAB

EXACT = CpuPrecision(layers=32, projection=32, heads=32)
PROMPTS = random_prompts(VOCAB, 256, 3, seed=5)


@pytest.fixture
def graph(tiny_bundle: Path) -> Any:
    return read_graph(tiny_bundle / "onnx" / "step.cpu.onnx")


@pytest.fixture(scope="module")
def divergence(tiny_bundle: Path) -> Divergence:
    return Divergence(load(tiny_bundle, variant="cpu", threads=1), PROMPTS, 12, threads=1)


def made_up_scales(bundle: Path) -> Scales:
    """Factors far from 1 for every activation, those that nothing can take among them."""
    rng = np.random.default_rng(3)
    standard = StepGraph(open_bundle(bundle))
    layers, smoothing = {}, {}
    for product in standard.matmuls:
        layers[product.name] = Layer(product.activation, product.weight, product.axis)
        factors = np.exp(rng.normal(size=product.channels)).astype(np.float32)
        smoothing[product.activation] = {"block": Smoothing(0.5, 0.0, 0.0, factors)}
    takers = {name: found.taker for name, found in smoothable(standard).items()}
    return Scales("max", layers, {}, {}, {}, smoothing, takers)


def operators(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph.graph))


def test_every_product_is_found_once_and_knows_its_layer(graph: Any):
    products = find_matmuls(graph)
    layers = Counter(product.layer for product in products if product.layer is not None)
    assert set(layers) == {0, 1} and len(set(layers.values())) == 1
    assert sum(product.is_projection for product in products) == 1
    assert sum(product.of_heads for product in products) == 1, "the shared projection: blocks are in 8 bits already"
    widths = sum(product.shape[0] for product in products if product.layer == 0)
    assert widths == 64 + 2 * 32 + 64 + 2 * 128 + 64, "query, key, value, output, gate, up, down"


def test_smoothing_alone_changes_nothing(graph: Any, tiny_bundle: Path, divergence: Divergence):
    scales = made_up_scales(tiny_bundle)
    products = find_matmuls(graph)
    smoothed = smooth(graph.graph, products, scales, {product.activation for product in products})
    assert len(smoothed) == 6, "two norms and a gated product a layer"
    assert sum(bool((product.divisors != 1).any()) for product in products) == 2
    for product in products:
        take_in(graph.graph, product)
    moved, same = divergence.of(graph)
    assert moved < 1e-6 and same == 1.0


@pytest.mark.parametrize(("biased", "tied", "smoothed"), [(False, False, ["m"]), (True, False, []), (False, True, [])])
def test_a_layer_takes_factors_unless_a_bias_or_another_reader_is_in_the_way(biased: bool, tied: bool, smoothed: list[str]):
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(2)
    arrays = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("up", "down")} | {"bias": np.ones(8, np.float32)}
    nodes = [make.make_node("MatMul", ["x", "up"], ["u0"], name="up")]
    nodes += [make.make_node("Add", ["u0", "bias"], ["u"])] if biased else []
    nodes += [make.make_node("MatMul", ["g", "up"], ["h"], name="again")] if tied else [make.make_node("Sigmoid", ["g"], ["h"])]
    nodes.append(make.make_node("Mul", ["h", "u" if biased else "u0"], ["m"]))
    nodes.append(make.make_node("MatMul", ["m", "down"], ["y"], name="down"))
    graph = make.make_graph(
        nodes,
        "mlp",
        [make.make_tensor_value_info(name, float32, [3, 8]) for name in ("x", "g")],
        [make.make_tensor_value_info("y", float32, [3, 8])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = ir.from_proto(make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10))
    layers = {"up": Layer("x", "up", 1), "down": Layer("m", "down", 1)}
    smoothing = {"m": {"block": Smoothing(0.5, 0.0, 0.0, np.exp(rng.normal(size=8)).astype(np.float32))}}
    matmuls = find_matmuls(model)
    scales = Scales("max", layers, {}, {}, {}, smoothing, {"m": Taker("layer", "up")})

    def run() -> Any:
        feeds = {name: np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8) for name in ("x", "g")}
        return opened(model).run(None, feeds)[0]

    before = run()
    done = smooth(model.graph, matmuls, scales, {matmul.activation for matmul in matmuls})
    assert [value.name for value in done] == smoothed
    for matmul in matmuls:
        take_in(model.graph, matmul)
    np.testing.assert_allclose(run(), before, rtol=1e-4, atol=1e-5)


def test_scales_of_older_versions_get_the_takers_that_calibrate_would_have_given_them(tiny_bundle: Path):
    scales = made_up_scales(tiny_bundle)
    assert Counter(taker.kind for taker in scales.takers.values()) == {"norm": 4, "layer": 2, "values": 2}
    older = replace(scales, takers={})
    assert with_takers(older, open_bundle(tiny_bundle)) == scales
    assert with_takers(scales, open_bundle(tiny_bundle)) is scales
    plain = replace(older, smoothing={})
    assert with_takers(plain, open_bundle(tiny_bundle)) is plain


def test_only_what_a_quantised_product_reads_is_smoothed(graph: Any, tiny_bundle: Path):
    scales = made_up_scales(tiny_bundle)
    one, *others = (product for product in find_matmuls(graph) if product.layer == 1)
    stored = {weight.name: weight.const_value for product in others for weight in product.weights}
    report = quantise_cpu(graph, replace(EXACT, kept={one.name: 8}), scales)
    assert report.smoothed == 1 and [bits for bits in report.bits.values() if bits < 32] == [8]
    assert all(graph.graph.initializers[name].const_value is tensor for name, tensor in stored.items()), "where they were"


def test_trials_take_their_weights_beside_the_graph(graph: Any, divergence: Divergence):
    # All weights inside, a graph of more than 2 GB could not be serialised.
    quantise_cpu(graph, CpuPrecision())
    small, weights = taken_apart(graph)
    packed = [value.const_value for value in graph.graph.initializers.values() if value.name in weights]
    taken = sum(array.nbytes for array in weights.values())
    assert taken > 90_000 and len(small) < len(ir.to_proto(graph).SerializeToString()) - 0.9 * taken
    assert packed and not any(isinstance(tensor, ir.ExternalTensor) for tensor in packed), "the graph itself stays as it was"
    assert divergence.of(graph) == divergence.of(graph)


def test_8_bits_are_close_and_4_bits_less_so(graph: Any, tiny_bundle: Path, divergence: Divergence):
    found = {}
    for bits in (8, 4):
        model = read_graph(tiny_bundle / "onnx" / "step.cpu.onnx")
        report = quantise_cpu(model, CpuPrecision(layers=bits, heads=8))
        assert set(report.bits.values()) == {8, bits} and report.after < 0.35 * report.before
        assert operators(model)["MatMulNBits"] == len(report.bits) + 1, "the heads' blocks had 8 bits before"
        found[bits] = divergence.of(model)[0]
    assert 0 < found[8] < 3e-3 < found[4] < 2


def test_precision_is_chosen_by_part_and_by_product(graph: Any):
    products = find_matmuls(graph)
    one = next(product.name for product in products if product.layer == 1)
    heard: list[tuple[int, str]] = []
    precision = CpuPrecision(layers=8, projection=4, heads=32, kept={one: 32})
    report = quantise_cpu(graph, precision, advance=lambda done, name: heard.append((done, name)))
    assert heard == list(enumerate(product.name for product in products)), "as many as there are"
    for product in products:
        expected = 4 if product.is_projection else 32 if product.of_heads or product.name == one else 8
        assert report.bits[product.name] == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_logits_are_computed_again(bits: int, tiny_bundle: Path, divergence: Divergence):
    def with_rescored(count: int) -> tuple[float, float]:
        model = read_graph(tiny_bundle / "onnx" / "step.cpu.onnx")
        quantise_cpu(model, replace(EXACT, projection=bits, rescored=count))
        return divergence.of(model)

    rough, exact = with_rescored(0), with_rescored(VOCAB)
    assert exact[0] < 1e-6 < rough[0] and exact[1] == 1.0
    assert with_rescored(16)[0] < rough[0]


def test_moments_of_uncorrelated_inputs_change_nothing_and_others_do(tiny_bundle: Path, divergence: Divergence):
    source = tiny_bundle / "onnx" / "step.cpu.onnx"
    sizes = {weight.name: product.shape[1] for product in find_matmuls(read_graph(source)) for weight in product.weights}
    rng = np.random.default_rng(6)
    mixed = {
        name: [(rows := rng.normal(size=(4 * size, size)) @ rng.normal(size=(size, size))).T @ rows]
        for name, size in sizes.items()
    }
    found = []
    for given in (None, {name: [np.eye(size)] for name, size in sizes.items()}, mixed):
        model = read_graph(source)
        quantise_cpu(model, CpuPrecision(layers=4, projection=32, heads=32), None, given)
        found.append(divergence.of(model)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5), "there is nothing to take back"
    assert found[2] != pytest.approx(found[0], rel=1e-2)


def test_rounding_a_few_rows_at_a_time_changes_nothing(graph: Any, monkeypatch: pytest.MonkeyPatch):
    product = find_matmuls(graph)[0]
    grid, codes = quantise_cpu_module.rounded(product, 8, 32)
    monkeypatch.setattr(matmuls_module, "NUMBERS_AT_A_TIME", 5 * product.shape[1])
    again, same = quantise_cpu_module.rounded(product, 8, 32)
    assert np.array_equal(grid.scales, again.scales) and np.array_equal(codes, same) and again.is_symmetric


@pytest.mark.parametrize(
    ("inputs", "bits", "block"),
    [(128, 8, 128), (192, 8, 64), (96, 8, 32), (96, 4, 32), (80, 8, 16), (80, 4, 16), (72, 8, None)],
)
def test_a_smaller_block_is_taken_where_the_default_does_not_fit(inputs: int, bits: int, block: int | None):
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(1)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((inputs, 8), (3, inputs)))
    graph = make.make_graph(
        [make.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "one",
        [make.make_tensor_value_info("x", float32, [3, inputs])],
        [make.make_tensor_value_info("y", float32, [3, 8])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = ir.from_proto(make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10))
    precision = CpuPrecision(layers=bits, heads=bits)
    if block is None:
        with pytest.raises(QuantisationError) as refused:
            quantise_cpu(model, precision)
        assert "multiples of 16" in str(refused.value.hint)
        return
    report = quantise_cpu(model, precision)
    [node] = model.graph
    assert node.attributes["block_size"].as_int() == block and set(report.bits.values()) == {bits}
    [y] = opened(model).run(None, {"x": x})
    assert np.linalg.norm(y - x @ weight) < (0.02 if bits == 8 else 0.2) * np.linalg.norm(y)


def test_what_is_refused(graph: Any, tiny_bundle: Path):
    for options in ({"layers": 3}, {"block": 48}, {"kept": {"x": 16}}):
        with pytest.raises(UsageError):
            CpuPrecision(**options)
    with pytest.raises(QuantisationError, match="no matrix product of the CPU graph was quantised") as refused:
        quantise_cpu(graph, CpuPrecision(layers=32, projection=32, block=128))
    assert "leave --block out" in str(refused.value.hint)
    broken = next(product for product in find_matmuls(graph) if product.layer == 1)
    weight = broken.weights[0]
    values = weight.const_value.numpy().copy()
    values[3, 3] = np.nan
    weight.const_value = ir.tensor(values, name=weight.name)
    with pytest.raises(QuantisationError, match=r"layers\.1/.* holds NaN"):
        quantise_cpu(graph, CpuPrecision())


def test_a_variant_runs_beside_the_others_and_is_replaced_whole(graph: Any, bundle_copy: Path):
    bundle = open_bundle(bundle_copy)
    report = quantise_cpu(graph, CpuPrecision())
    weights = [value.const_value for value in graph.graph.initializers.values()]
    kept = {tensor.name for tensor in weights if isinstance(tensor, ir.ExternalTensor)}
    assert kept & {"projection.weight", "heads.shared.weight"}, "the embedding is read from the bundle's own weights"
    added = add_variant(bundle, "cpu-int8", graph, {"plain_step_bytes": report.plain})
    opened = open_bundle(bundle_copy)
    assert opened.manifest == added.manifest and opened.manifest.provenance["quantised"]["cpu-int8"]
    own = bundle_copy / "onnx" / "cpu-int8" / "weights.bin"
    assert own.stat().st_size < 0.5 * (bundle_copy / "onnx" / "weights.bin").stat().st_size + (1 << 22)
    session = load(bundle_copy, variant="cpu-int8", threads=1)
    assert session.generate(token_ids=PROMPTS[0], max_new_tokens=8).token_ids
    for prompt in PROMPTS:
        after = prefill(session.executor, 0, prompt, wanted=Wanted(logits=True))
        assert after.logits is not None
        assert after.next_token == after.logits[0].argmax(), "chosen among the logits that were computed again"
    with pytest.raises(BundleExistsError, match="cpu-int8"):
        check_variant(opened.manifest, "cpu-int8", force=False)
    with pytest.raises(UsageError, match="standard"):
        check_variant(opened.manifest, "standard", force=True)
    again = read_graph(bundle_copy / "onnx" / "step.cpu.onnx")
    quantise_cpu(again, CpuPrecision(layers=4))
    add_variant(opened, "cpu-int8", again, {"plain_step_bytes": 1})
    assert open_bundle(bundle_copy).manifest.provenance["quantised"]["cpu-int8"] == {"plain_step_bytes": 1}
    assert sorted(path.name for path in bundle_copy.iterdir()) == sorted(path.name for path in bundle.folder.iterdir())
