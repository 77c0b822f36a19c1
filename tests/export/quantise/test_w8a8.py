"""Activations in 8 bits: folding factors changes no output, products read rounded values, what is kept stays as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medusa_deploy.export.quantise import engine_weights as quantise  # noqa: E402
from medusa_deploy.export.quantise.engine_weights import quantise_weights  # noqa: E402
from medusa_deploy.export.quantise.smooth_standard import fold_smoothing  # noqa: E402
from medusa_deploy.export.quantise.takers import attention_of, find_takers  # noqa: E402
from medusa_deploy.export.quantise.w8a8 import (  # noqa: E402
    LARGEST_ERROR,
    OF_ATTENTION,
    PrecisionOptions,
    parts,
    quantise_activations,
    quantise_network,
)
from medusa_deploy.export.quantise.w8a8_variant import write_w8a8_variant  # noqa: E402
from medusa_deploy.export.weights import read_graph  # noqa: E402
from medusa_deploy.runtime.errors import BundleExistsError, UsageError  # noqa: E402
from medusa_deploy.runtime.files.bundle import open_bundle  # noqa: E402
from medusa_deploy.runtime.files.scales_file import (  # noqa: E402
    ActivationScale,
    Layer,
    Scales,
    Smoothing,
    Taker,
    model_digest,
    read_scales,
)
from medusa_deploy.runtime.session import load  # noqa: E402
from medusa_deploy.tools.measure.probe import Probe  # noqa: E402
from medusa_deploy.tools.prompt_source import random_prompts  # noqa: E402
from support.graphs import opened  # noqa: E402
from support.tiny import VOCAB  # noqa: E402

C, M, V = 128, 160, 256
RNG = np.random.default_rng(0)
WEIGHTS = {
    "norm": RNG.uniform(0.5, 2, C).astype(np.float32),
    "wg": RNG.normal(0, 0.1, (C, M)).astype(np.float32),
    "wu": np.ascontiguousarray(RNG.normal(0, 0.1, (C, M)).astype(np.float32).T),
    "bu": RNG.normal(0, 0.1, M).astype(np.float32),
    "wd": RNG.normal(0, 0.1, (M, C)).astype(np.float32),
    "wp": RNG.normal(0, 0.1, (C, V)).astype(np.float32),
}
X = RNG.normal(0, 1, (40, C)).astype(np.float32)
X[:, 5] *= 60
READ = {"gate": ("n", "wg", 1), "up": ("n", "wu", 0), "down": ("m", "wd", 1), "project": ("hidden", "wp", 1)}
LAYERS = {name: Layer(*read) for name, read in READ.items()}


def mlp(half: bool = False) -> Any:
    """A norm's weight, an MLP whose up product stands transposed and has a bias, and a projection."""
    nodes = [
        helper.make_node("Mul", ["norm", "x"], ["n"], "norm_mul"),
        helper.make_node("MatMul", ["n", "wg"], ["g"], "gate"),
        helper.make_node("Sigmoid", ["g"], ["sg"], "sigmoid"),
        helper.make_node("Transpose", ["wu"], ["wut"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["n", "wut"], ["u0"], "up"),
        helper.make_node("Add", ["u0", "bu"], ["u"], "bias"),
        helper.make_node("Mul", ["sg", "u"], ["m"], "gated"),
        helper.make_node("MatMul", ["m", "wd"], ["d"], "down"),
        helper.make_node("Add", ["x", "d"], ["hidden"], "residual"),
        helper.make_node("MatMul", ["hidden", "wp"], ["logits"], "project"),
    ]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    tensors = [numpy_helper.from_array(array.astype(dtype), name) for name, array in WEIGHTS.items()]
    inputs = [helper.make_tensor_value_info("x", kind, ["N", C])]
    outputs = [helper.make_tensor_value_info(name, kind, ["N", size]) for name, size in (("hidden", C), ("logits", V))]
    graph = helper.make_graph(nodes, "step", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: Any, *names: str) -> list[np.ndarray]:
    session = opened(model, optimised=False)
    dtype = np.float16 if "16" in session.get_inputs()[0].type else np.float32
    return session.run(list(names), {"x": X.astype(dtype)})  # type: ignore[no-any-return]


def scales(**errors: float) -> Scales:
    """Of ``X``, with factors of alpha 0.9 or so; ``errors`` of the activations' products."""
    n = WEIGHTS["norm"] * X
    u = n @ WEIGHTS["wu"].T + WEIGHTS["bu"]
    m = u / (1 + np.exp(-(n @ WEIGHTS["wg"])))
    hidden = X + m @ WEIGHTS["wd"]
    activations, smoothing = {}, {}
    for name, value in {"n": n, "m": m, "hidden": hidden}.items():
        maxima = np.abs(value).max(0)
        activations[name] = ActivationScale(float(maxima.max()) / 127, float(maxima.max()), 40, 0, 0, 0.01, maxima)
        if name != "hidden":
            factors = (maxima**0.9).astype(np.float32)
            entry = Smoothing(0.9, errors.get(name, 1e-4), 1e-2, factors)
            smoothing[name] = {"block": entry, "tensor": entry}
    return Scales("max", LAYERS, activations, {}, {}, smoothing)


@pytest.mark.parametrize("takers", [{}, {"n": Taker("norm", "norm"), "m": Taker("layer", "up")}], ids=["found", "given"])
def test_folding_factors_divides_the_activations_and_leaves_the_outputs_as_they_are(takers: dict[str, Taker]) -> None:
    model, given = mlp(), replace(scales(), takers=takers)
    before = run(model, "hidden", "logits")
    assert fold_smoothing(model.graph, given, ["n", "m", "hidden"]) == {"n", "m"}
    for old, new in zip(before, run(model, "hidden", "logits"), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4 * np.abs(old).max())
    for name in ("n", "m"):
        exposed = ir.from_proto(ir.to_proto(model))
        value = next(node.outputs[0] for node in exposed.graph if node.outputs[0].name == name)
        exposed.graph.outputs.append(value)
        maxima = np.abs(run(exposed, name)[0]).max(0)
        expected = given.activations[name].channel_maxima / given.smoothing[name]["tensor"].factors
        np.testing.assert_allclose(maxima, expected, rtol=1e-3)
    assert not {"norm", "wg", "wu", "bu", "wd"} & set(model.graph.initializers), "what nobody reads isn't stored"


def test_an_activation_that_something_else_reads_is_not_smoothed() -> None:
    model = mlp()
    n = next(node for node in model.graph if node.name == "norm_mul").outputs[0]
    model.graph.outputs.append(n)
    before = run(model, "hidden", "n")
    assert fold_smoothing(model.graph, scales(), ["n", "m"]) == {"m"}
    for old, new in zip(before, run(model, "hidden", "n"), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_products_of_the_backbone_read_8_bits_and_are_near_the_exact_ones(half: bool) -> None:
    given, exact = scales(), run(mlp(half), "hidden")[0]
    errors = {}
    for smooth in (True, False):
        model = mlp(half)
        done = quantise_activations(model, given if smooth else replace(given, smoothing={}), ())
        assert done == ["gate", "up", "down"]
        quantise_weights(model, {"project"})
        onnx.checker.check_model(ir.to_proto(model))
        counts = Counter(node.op_type for node in model.graph)
        assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (2, 6)
        for node in model.graph:
            if node.name in done:
                assert node.inputs[0].producer().op_type == "DequantizeLinear"
        for name in model.graph.initializers:
            if name.endswith("zero_point"):
                assert model.graph.initializers[name].const_value.numpy() == 0
        found = run(model, "hidden")[0]
        errors[smooth] = float(np.linalg.norm((found - exact).astype(np.float32)) / np.linalg.norm(exact.astype(np.float32) - X))
    assert 1e-4 < errors[True] < errors[False] / 2


def test_layers_are_kept_by_their_error_or_by_name() -> None:
    model = mlp()
    assert quantise_activations(model, scales(n=3e-4, m=5e-4)) == ["gate", "up"], "down's error is too large"
    assert quantise_activations(mlp(), scales(), ["up"]) == ["gate", "down"]
    with pytest.raises(UsageError, match="no layer 'project'") as caught:
        quantise_activations(mlp(), scales(), ["project"])
    assert "gate" in caught.value.hint
    kept = mlp()
    before = run(kept, "logits")[0]
    quantise_activations(kept, scales(), ["gate", "up", "down"])
    np.testing.assert_array_equal(run(kept, "logits")[0], before)


@pytest.mark.parametrize("variant", ["standard", "device"])
def test_values_take_factors_that_all_queries_of_a_head_share_and_no_others(tiny_bundle: Path, variant: str) -> None:
    bundle = open_bundle(tiny_bundle)
    model = read_graph(bundle.path(bundle.manifest.variants[variant]))
    made_by_attention = [node.inputs[0].name for node in model.graph if node.op_type == "MatMul" and attention_of(node.inputs[0])]
    assert len(made_by_attention) == 2
    shared = np.repeat(RNG.uniform(0.5, 2, (2, 1, 16)), 2, 1).ravel().astype(np.float32)
    of_each = RNG.uniform(0.5, 2, shared.size).astype(np.float32)
    given = {
        name: {"tensor": Smoothing(0.5, 0, 0, factors)}
        for name, factors in zip(made_by_attention, (shared, of_each), strict=True)
    }
    assert fold_smoothing(model.graph, Scales("max", {}, {}, {}, {}, given), made_by_attention) == {made_by_attention[0]}


def test_values_in_the_caches_are_divided_and_the_logits_are_what_they_were(bundle_copy: Path, tmp_path: Path) -> None:
    from medusa_deploy.export.variant import add_variant
    from medusa_deploy.tools.making.scales import calibrate

    data = tmp_path / "prompts.jsonl"
    prompts = random_prompts(VOCAB, 256, 4, seed=3)
    data.write_text("".join(f'{{"token_ids": {prompt}}}\n' for prompt in prompts), "utf-8")
    given = calibrate(bundle_copy, tmp_path / "scales.json", data, max_new_tokens=16, smooth=0.9, threads=1)
    bundle = open_bundle(bundle_copy)
    model = read_graph(bundle.path(bundle.manifest.variants["standard"]))
    assert Counter(taker.kind for taker in given.takers.values()) == {"norm": 4, "layer": 2, "values": 2}
    assert find_takers(model.graph, given.smoothing) == given.takers
    assert len(fold_smoothing(model.graph, given, given.smoothing)) == 8
    bundle = add_variant(bundle, "int8", model, {})
    sessions = {name: load(bundle_copy, variant=name, threads=1) for name in ("standard", "int8")}
    for prompt in prompts:
        found = []
        for session in sessions.values():
            # Trees: rows are moved in the caches. Their number is fixed: what rejected rows leave there must not depend on time.
            answer = session.generate(token_ids=prompt, max_new_tokens=24, rows=6).token_ids
            with Probe(session) as probe:
                found.append((answer, probe.replay(prompt, answer)))
        (tokens, logits), (others, smoothed) = found
        assert tokens == others
        np.testing.assert_allclose(smoothed, logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())
    values = [session.executor.caches[1::2] for session in sessions.values()]
    ratios = np.abs(values[0]).max((1, 2, 3)) / np.abs(values[1]).max((1, 2, 3))
    assert (np.abs(ratios - 1) > 1e-2).all(), "keys are what they were, values aren't"


def test_attention_may_be_changed_more_than_other_products(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    done = {}
    for error in (LARGEST_ERROR / 2, LARGEST_ERROR * 2, LARGEST_ERROR * OF_ATTENTION * 2):
        model = read_graph(bundle.path(bundle.manifest.variants["standard"]))
        part = parts(model.graph)
        nodes = [node for node in model.graph if part.get(node.name) == "backbone"]
        layers = {node.name: Layer(node.inputs[0].name, node.inputs[1].name, 1) for node in nodes}
        rough = ActivationScale(0.1, 12.7, 200, 0, 0, error**0.5, np.ones(1, np.float32))
        given = Scales("max", layers, {layer.activation: rough for layer in layers.values()}, {}, {}, {})
        patch = pytest.MonkeyPatch()
        patch.setattr(quantise, "_SMALLEST_WEIGHT", 1)
        try:
            done[error] = quantise_activations(model, given)
        finally:
            patch.undo()
    assert [len(found) for found in done.values()] == [14, 2, 0]


def test_the_projection_and_the_heads_have_a_precision_of_their_own() -> None:
    assert dict(parts(mlp().graph)) == {"gate": "backbone", "up": "backbone", "down": "backbone", "project": "projection"}
    for projection, weights in (("int8", 4), ("fp16", 3)):
        model = mlp(half=True)
        assert quantise_network(model, PrecisionOptions(projection=projection), scales()).weights == weights
        assert ("wp" in model.graph.initializers) == (projection == "fp16")
    with pytest.raises(UsageError):
        PrecisionOptions(heads="fp4")
    with pytest.raises(UsageError, match="without scales"):
        PrecisionOptions(keep=("up",))


def test_the_variant_runs_and_the_bundle_is_still_the_same_model(bundle_copy: Path, tmp_path: Path) -> None:
    from medusa_deploy.tools.making.scales import calibrate

    data = tmp_path / "prompts.jsonl"
    prompts = random_prompts(VOCAB, 256, 5, seed=2)
    data.write_text("".join(f'{{"token_ids": {prompt}}}\n' for prompt in prompts), "utf-8")
    given = calibrate(bundle_copy, tmp_path / "scales.json", data, max_new_tokens=16, threads=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(quantise, "_SMALLEST_WEIGHT", 1)
    try:
        made = write_w8a8_variant(open_bundle(bundle_copy), given, ())
    finally:
        patch.undo()
    opened = open_bundle(bundle_copy)
    assert model_digest(opened.manifest) == given.provenance["model_sha256"]
    read_scales(tmp_path / "scales.json", opened.manifest)
    facts = made.manifest.provenance["quantised"]["int8"]
    assert (facts["layers"], facts["kept"]) == (14, [])
    answers = {
        variant: [session.generate(token_ids=prompt, max_new_tokens=8) for prompt in prompts]
        for variant in ("standard", "int8")
        for session in [load(bundle_copy, variant=variant, threads=1)]
    }
    same = [a.token_ids[:2] == b.token_ids[:2] for a, b in zip(answers["standard"], answers["int8"], strict=True)]
    assert sum(same) >= 3
    with pytest.raises(BundleExistsError):
        write_w8a8_variant(opened, given)
