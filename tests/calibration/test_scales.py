"""Collecting and scales: what torch computes is what is observed, resumed runs are equal, bad data and weights are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from medusa_deploy.calibration.int8 import collect as module  # noqa: E402
from medusa_deploy.calibration.int8.collect import Calibrator  # noqa: E402
from medusa_deploy.calibration.int8.observations import Observations  # noqa: E402
from medusa_deploy.calibration.int8.ranges import Method  # noqa: E402
from medusa_deploy.calibration.int8.scales import make_scales  # noqa: E402
from medusa_deploy.runtime.errors import CalibrationError, QuantisationError, RangeError  # noqa: E402
from medusa_deploy.runtime.executors.step_plan import SlotRows  # noqa: E402
from medusa_deploy.runtime.files.bundle import open_bundle  # noqa: E402
from medusa_deploy.runtime.files.scales_file import read_scales  # noqa: E402
from medusa_deploy.tools.prompt_source import random_prompts  # noqa: E402
from support.tiny import HEADS, HIDDEN, VOCAB  # noqa: E402

PROMPTS = random_prompts(VOCAB, 256, 5, seed=2)
PER_LAYER = 7
LAYERS = 2


@pytest.fixture(scope="module")
def calibrator(tiny_bundle: Path) -> Calibrator:
    return Calibrator(open_bundle(tiny_bundle), threads=1)


@pytest.fixture(scope="module")
def seen(calibrator: Calibrator) -> Observations:
    return calibrator.collect(PROMPTS, 24)


def linear_inputs(folder: Path, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
    """Channel maxima of every Linear's input, in order, over the last so many positions of each sequence, by torch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    linears = [part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    maxima = [np.zeros(part.in_features, np.float32) for part in linears]
    last = 0

    def hook(index: int) -> Any:
        def keep(_part: Any, inputs: Any) -> None:
            np.maximum(maxima[index], inputs[0][0, -last:].abs().amax(0).numpy(), out=maxima[index])

        return keep

    for index, part in enumerate(linears):
        part.register_forward_pre_hook(hook(index))
    with torch.no_grad():
        for tokens, count in sequences:
            last = count
            model(torch.tensor([tokens]))
    return maxima


def test_what_is_observed_is_what_torch_computes_in_prefill_and_in_every_row_of_every_tree(
    calibrator: Calibrator, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    (prompt,) = random_prompts(VOCAB, 256, 1, seed=3)
    steps: list[tuple[int, np.ndarray, np.ndarray]] = []
    call = module.ObservingExecutor._call

    def spy(self: Any, bound: Any, rows: SlotRows, length: int) -> None:
        if length >= len(prompt):
            steps.append((length, rows.tokens.copy(), rows.shape.ancestors))
        call(self, bound, rows, length)

    monkeypatch.setattr(module.ObservingExecutor, "_call", spy)
    found = calibrator.collect([prompt], 8)
    emitted = calibrator.session.generate(token_ids=prompt, max_new_tokens=8, tree=calibrator.session.tree).token_ids
    text = prompt + emitted
    paths = [
        (text[:at] + tokens[above].tolist(), 1) for at, tokens, ancestors in steps[: found.tree_rows // 4] for above in ancestors
    ]
    assert len(paths) == found.tree_rows > 4
    expected = linear_inputs(tiny_model, [(prompt, len(prompt)), *paths])
    products = calibrator.matmuls[: PER_LAYER * LAYERS]
    for product, maxima in zip(products, expected, strict=True):
        observer = found.observers[product.activation]
        np.testing.assert_allclose(observer.channel_maxima, maxima, rtol=1e-4, atol=1e-5)
        assert observer.rows == len(prompt) + found.tree_rows


def test_every_product_with_a_constant_weight_is_there_and_sees_the_rows_that_it_computes(
    calibrator: Calibrator, seen: Observations
):
    products = calibrator.matmuls
    of_heads = [product for product in products if product.of_heads]
    (projection,) = [product for product in products[PER_LAYER * LAYERS :] if not product.of_heads]
    assert len(products) == PER_LAYER * LAYERS + 1 + HEADS + 1
    assert projection.channels == HIDDEN
    steps = seen.tree_rows // calibrator.session.tree.rows
    chunks = sum(-(-len(prompt) // 16) for prompt in PROMPTS)
    assert seen.prefill_rows == sum(map(len, PROMPTS))
    assert seen.observers[projection.activation].rows == chunks + seen.tree_rows
    *blocks, shared = (seen.observers[product.activation].rows for product in of_heads)
    assert (set(blocks), shared) == ({len(PROMPTS) + steps}, HEADS * (len(PROMPTS) + steps))


def test_scales_are_ranges_and_weights_in_127_steps_and_are_read_back(
    calibrator: Calibrator, seen: Observations, tiny_model: Path, tmp_path: Path
):
    from safetensors.numpy import load_file

    scales = make_scales(calibrator, seen, Method(), calibrator.settings(PROMPTS, 24))
    path = tmp_path / "scales.json"
    path.write_text(scales.to_json(), "utf-8")
    read = read_scales(path, calibrator.bundle.manifest)
    assert read.to_json() == scales.to_json()
    product = calibrator.matmuls[6]
    activation, weights = read.of_layer(product.name)
    tensor = load_file(tiny_model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_allclose(weights, np.abs(tensor).max(1) / 127, rtol=1e-6)
    assert activation.scale == pytest.approx(float(activation.channel_maxima.max()) / 127)
    assert (activation.clipped, activation.rows) == (0, seen.prefill_rows + seen.tree_rows)
    assert read.provenance["tree_rows"] == seen.tree_rows
    assert len(read.provenance["data_sha256"]) == len(read.provenance["model_sha256"]) == 64


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_result(
    calibrator: Calibrator, seen: Observations, tmp_path: Path, after: int
):
    path = tmp_path / "progress"

    def interrupt(done: int, _note: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrator.collect(PROMPTS, 24, path, interrupt)
    done: list[int] = []
    resumed = calibrator.collect(PROMPTS, 24, path, lambda count, _note: done.append(count))
    assert done == list(range(after + 1, len(PROMPTS) + 1))
    settings = calibrator.settings(PROMPTS, 24)
    for method in (Method(), Method("percentile", 99.0)):
        one, other = (make_scales(calibrator, part, method, settings) for part in (resumed, seen))
        assert one.to_json() == other.to_json()
    assert [entry.name for entry in tmp_path.iterdir()] == ["progress"]


def test_what_an_interrupted_prompt_showed_is_not_counted_twice(
    calibrator: Calibrator, seen: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, calls = module.ObservingExecutor._call, 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.ObservingExecutor, "_call", failing)
        with pytest.raises(KeyboardInterrupt):
            calibrator.collect(PROMPTS, 24, tmp_path / "progress")
    resumed = calibrator.collect(PROMPTS, 24, tmp_path / "progress")
    assert (resumed.prompts, resumed.prefill_rows, resumed.tree_rows) == (5, seen.prefill_rows, seen.tree_rows)
    assert all((resumed.observers[name].counts == observer.counts).all() for name, observer in seen.observers.items())


def test_progress_of_another_run_and_damaged_progress_are_refused(calibrator: Calibrator, tmp_path: Path):
    path = tmp_path / "progress"
    calibrator.collect(PROMPTS[:1], 4).save(path, calibrator.settings(PROMPTS[:1], 4))
    with pytest.raises(CalibrationError, match="other settings: max_new_tokens"):
        calibrator.collect(PROMPTS[:1], 5, path)
    with pytest.raises(CalibrationError, match="other settings: data_sha256, prompts"):
        calibrator.collect(PROMPTS[:2], 4, path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], json.dumps({}).encode()):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match="can't be read"):
            calibrator.collect(PROMPTS[:1], 4, path)


def test_a_last_chunk_of_one_token_belongs_to_the_prefill(calibrator: Calibrator):
    prompt = random_prompts(VOCAB, 256, 1, seed=9)[0] * 17
    seen = calibrator.collect([prompt[:17]], 2)
    assert (seen.prefill_rows, seen.tree_rows) == (17, calibrator.session.tree.rows)


def test_bindings_hold_no_activations_between_calls(calibrator: Calibrator):
    """They are kept, one for each length of a chunk, and a call's activations may take 256 MiB."""
    executor = calibrator._executor
    calibrator.collect(PROMPTS[:2], 4)
    kept = dict(executor._bound._kept)
    assert kept
    for (*_, wanted), bound in kept.items():  # type: ignore[misc]
        added = executor._added(wanted)
        assert len(added) > 2 * LAYERS
        assert [value.has_value() for value in bound.io.get_outputs()].count(False) == len(added)


def test_a_large_model_is_prefilled_in_fewer_rows_at_a_time(
    tiny_bundle: Path, seen: Observations, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_MOST_OBSERVED_BYTES", 20_000)
    small = Calibrator(open_bundle(tiny_bundle), threads=1)
    assert small.session.manifest.limits.prefill_chunk < 16
    found = small.collect(PROMPTS, 24)
    assert found.prefill_rows == seen.prefill_rows
    name = small.matmuls[0].activation
    np.testing.assert_allclose(found.observers[name].channel_maxima, seen.observers[name].channel_maxima, rtol=1e-4)


def test_where_the_tree_is_its_root_alone_heads_run_in_no_step_and_are_not_watched(bundle_copy: Path, seen: Observations):
    bundle = open_bundle(bundle_copy)
    plain = Calibrator(replace(bundle, manifest=replace(bundle.manifest, trees={"default": []})), threads=1)
    found = plain.collect(PROMPTS, 24)
    assert found.tree_rows > 0
    assert not any(product.of_heads for product in plain.matmuls)
    scales = make_scales(plain, found, Method(), plain.settings(PROMPTS, 24))
    assert len(scales.layers) == PER_LAYER * LAYERS + 1
    assert set(scales.activations) < set(seen.observers)


def test_too_little_data_is_refused(calibrator: Calibrator, seen: Observations):
    for prompts, new_tokens, what in (([[1, 2]], 4, "scales need 128"), (PROMPTS * 3, 1, "no step of a tree")):
        found = calibrator.collect(prompts, new_tokens)
        with pytest.raises(CalibrationError, match=what):
            make_scales(calibrator, found, Method(), {})
    untouched = Observations.of(calibrator.matmuls)
    untouched.prefill_rows = untouched.tree_rows = 1000
    with pytest.raises(CalibrationError, match="never computed"):
        make_scales(calibrator, untouched, Method(), {})


@pytest.mark.parametrize(
    ("value", "error"),
    [(np.nan, QuantisationError), (np.inf, QuantisationError), (1e-39, RangeError)],
)
def test_weights_that_no_scale_fits_are_refused_by_channel(
    calibrator: Calibrator, monkeypatch: pytest.MonkeyPatch, value: float, error: type[Exception]
):
    weight = np.ones((4, 6), np.float32)
    weight[:, 3] = 0
    monkeypatch.setattr(calibrator.graph, "_values", lambda _name: weight)
    scales = calibrator.graph.weight_scales("w", 1)
    assert scales.tolist() == [pytest.approx(1 / 127)] * 3 + [1.0] + [pytest.approx(1 / 127)] * 2
    weight[1, 3] = value
    with pytest.raises(error, match="in channel 3"):
        calibrator.graph.weight_scales("w", 1)
    weight[:] = 0
    with pytest.raises(RangeError, match="is zero"):
        calibrator.graph.weight_scales("w", 1)
