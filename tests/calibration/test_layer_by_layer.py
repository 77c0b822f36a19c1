"""Layer by layer: what is seen is what the whole graph shows for the same texts, with one layer's weights at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from medusa_deploy.calibration.int8 import layer_by_layer as module  # noqa: E402
from medusa_deploy.calibration.int8.collect import Calibrator  # noqa: E402
from medusa_deploy.calibration.int8.layer_by_layer import LayerCalibrator, Measured  # noqa: E402
from medusa_deploy.calibration.int8.layer_cut import cut_layers  # noqa: E402
from medusa_deploy.calibration.int8.matmuls import Matmul, StepGraph  # noqa: E402
from medusa_deploy.calibration.int8.observations import Observations  # noqa: E402
from medusa_deploy.calibration.int8.ranges import Method  # noqa: E402
from medusa_deploy.calibration.int8.row_sample import find_smoothing  # noqa: E402
from medusa_deploy.calibration.int8.scales import make_scales  # noqa: E402
from medusa_deploy.runtime.errors import CalibrationError  # noqa: E402
from medusa_deploy.runtime.files.bundle import open_bundle  # noqa: E402
from medusa_deploy.tools.prompt_source import random_prompts  # noqa: E402
from support.tiny import VOCAB  # noqa: E402

LAYERS = 2
ALPHAS = (None, 0.5)
PROMPTS = random_prompts(VOCAB, 256, 5, seed=2)
PREFIXES = [PROMPTS[0][:end] for end in range(1, 13)]


@pytest.fixture(scope="module")
def layers(tiny_bundle: Path) -> LayerCalibrator:
    return LayerCalibrator(open_bundle(tiny_bundle), threads=1)


@pytest.fixture(scope="module")
def measured(layers: LayerCalibrator) -> Measured:
    return layers.measure(PROMPTS, ALPHAS)


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path) -> Calibrator:
    return Calibrator(open_bundle(tiny_bundle), threads=1)


def assert_same(one: Observations, other: Observations, names: list[str]) -> None:
    """Equal but for rounding: a magnitude on the border of two bins may be in either."""
    for name in names:
        a, b = one.observers[name], other.observers[name]
        np.testing.assert_allclose(a.channel_maxima, b.channel_maxima, rtol=1e-4, atol=1e-5, err_msg=name)
        assert a.rows == b.rows > 0, name
        assert a.exponent == b.exponent
        shifted = np.abs(np.cumsum(a.counts - b.counts))
        assert a.counts.sum() == b.counts.sum()
        assert shifted.max() <= 3 + 0.002 * a.counts.sum(), name


def test_layers_see_what_the_whole_graph_sees_in_the_prefill_of_the_same_texts(whole: Calibrator, measured: Measured):
    expected = whole.collect(PROMPTS, 1)  # the first token comes with the prefill: no step follows
    assert expected.tree_rows == 0
    assert (measured.seen.prompts, measured.seen.prefill_rows) == (5, expected.prefill_rows)
    assert list(measured.seen.observers) == list(expected.observers)
    of_layers = list(dict.fromkeys(matmul.activation for matmul in whole.matmuls[: 7 * LAYERS]))
    assert_same(measured.seen, expected, of_layers)


def test_projection_and_heads_see_every_token_of_a_text_as_a_root(whole: Calibrator, layers: LayerCalibrator):
    """A prefill shows them its last row only: those of all beginnings of a text are what the text shows here."""
    expected = whole.collect(PREFIXES, 1)
    found = layers.measure(PREFIXES[-1:], ()).seen
    names = [matmul.activation for matmul in whole.matmuls[7 * LAYERS :]]
    assert_same(found, expected, names)


def test_smoothing_is_that_of_the_same_rows_and_weights(whole: Calibrator, measured: Measured):
    expected = find_smoothing(whole, measured.seen, PROMPTS, 1, ALPHAS)
    assert list(measured.smoothing) == list(expected)
    for name, grids in expected.items():
        for grid, entry in grids.items():
            found = measured.smoothing[name][grid]
            assert found.alpha == entry.alpha
            assert found.error == pytest.approx(entry.error, rel=0.02)
            np.testing.assert_allclose(found.factors, entry.factors, rtol=1e-3)


def test_scales_of_weights_are_those_of_the_whole_graph(whole: Calibrator, measured: Measured):
    assert list(measured.weights) == list(dict.fromkeys((matmul.weight, matmul.axis) for matmul in whole.matmuls))
    for key, scales in measured.weights.items():
        np.testing.assert_array_equal(scales, whole.graph.weight_scales(*key))


def test_a_stage_holds_the_weights_of_its_own_layer_alone(layers: LayerCalibrator):
    assert [len(stage.matmuls) for stage in layers.stages] == [7, 7, len(layers.matmuls) - 14]
    own = [{matmul.weight for matmul in stage.matmuls} for stage in layers.stages[:-1]]
    for number, stage in enumerate(layers.stages):
        piece = onnx.load_from_string(layers.graph.piece(stage.before, stage.outputs))
        there = {tensor.name for tensor in piece.graph.initializer}
        for layer, weights in enumerate(own):
            assert there & weights == (weights if layer == number else set())


def nodes_of(*lines: str) -> StepGraph:
    """A graph without weights from lines like ``y = Add x f``; matmuls are beside the point."""
    graph = object.__new__(StepGraph)
    nodes = []
    for line in lines:
        output, _, right = line.partition(" = ")
        kind, *inputs = right.split()
        nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output))
    graph._model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    graph._producers = {output: node for node in graph._model.graph.node for output in node.output}
    return graph


FIRST = ["x = Gather table tokens", "a = Attention x past_key.0 past_value.0", "y = Add x a"]
NORM = "hidden = Norm z"


def test_a_graph_that_is_no_chain_of_layers_is_refused_by_name():
    own = nodes_of(*FIRST, "s = Shape past_key.0", "b = Attention y past_key.1 past_value.1 s", "z = Add y b", NORM)
    first, second, rest = cut_layers(own, 2, [Matmul("b", "y", "w", 1, 4, of_heads=False)])
    assert [(stage.before, stage.after) for stage in (first, second, rest)] == [(None, "y"), ("y", "z"), ("z", None)]
    assert (second.activations, second.outputs) == ({"y": 4}, ["z"]), "what it is given it needn't give back"
    shared = nodes_of(*FIRST, "b = Attention y past_key.1 past_key.0", "z = Add y b", NORM)
    with pytest.raises(CalibrationError, match=r"layer 1 depends on past_key\.0, the cache of another"):
        cut_layers(shared, 2, [])
    headless = nodes_of(*FIRST, "b = Attention y past_key.1", "z = Add y b")
    with pytest.raises(CalibrationError, match="where layer 0 ends"):
        cut_layers(headless, 2, [])


def test_progress_names_every_layer_and_counts_the_stages(layers: LayerCalibrator):
    heard: list[tuple[int, str]] = []
    layers.measure(PROMPTS[:1], (), progress=lambda done, note: heard.append((done, note)))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == len(layers.stages) == LAYERS + 1
    assert {note.partition(":")[0] for _, note in heard} == {"layer 0", "layer 1", "the last norm, projection and heads"}


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_goes_on_behind_the_last_stage_and_ends_with_the_same_result(
    layers: LayerCalibrator, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    path, opened = tmp_path / "progress", []
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_open", lambda stage: interrupt(opened, after) or LayerCalibrator._open(layers, stage))
        with pytest.raises(KeyboardInterrupt):
            layers.measure(PROMPTS, ALPHAS, path)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_open", lambda stage: opened.append(stage.layer) or LayerCalibrator._open(layers, stage))
        resumed = layers.measure(PROMPTS, ALPHAS, path)
    assert opened == [None] * after + list(range(after, LAYERS + 1))
    one, other = (
        make_scales(layers, each.seen, Method(), {}, each.smoothing, each.weights, steps=False) for each in (resumed, measured)
    )
    assert one.to_json() == other.to_json()
    for name, observer in measured.seen.observers.items():
        np.testing.assert_array_equal(resumed.seen.observers[name].counts, observer.counts)


def interrupt(opened: list[int | None], after: int) -> None:
    """Ctrl-C when more than ``after`` stages are opened."""
    if len(opened) == after:
        raise KeyboardInterrupt
    opened.append(None)


def test_progress_of_other_texts_and_damaged_progress_are_refused(
    layers: LayerCalibrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    path = tmp_path / "progress"
    layers.measure(PROMPTS, (), path)
    with pytest.raises(CalibrationError, match="other settings: data_sha256"):
        layers.measure(PROMPTS[::-1], (), path)
    with pytest.raises(CalibrationError, match="other settings: alphas"):
        layers.measure(PROMPTS, ALPHAS, path)
    with np.load(path) as saved:
        arrays = dict(saved)
    for name, broken in (("states", arrays["states"][:-1]), ("smoothing", np.array("[")), ("factors", np.ones(3, np.float32))):
        with path.open("wb") as file:
            np.savez(file, **{**arrays, name: broken})
        with pytest.raises(CalibrationError, match="can't be read"):
            layers.measure(PROMPTS, (), path)


@pytest.mark.parametrize("text", [[], [1] * 257])
def test_texts_that_do_not_fit_are_refused(layers: LayerCalibrator, text: list[int]):
    with pytest.raises(CalibrationError, match="empty or too long"):
        layers.measure([text], ())


def test_where_the_tree_is_its_root_alone_heads_are_not_watched(tiny_bundle: Path):
    bundle = open_bundle(tiny_bundle)
    plain = LayerCalibrator(replace(bundle, manifest=replace(bundle.manifest, trees={"default": []})), threads=1)
    found = plain.measure(PROMPTS[:2], ())
    assert len(found.weights) == 7 * LAYERS + 1
    assert all(observer.rows for observer in found.seen.observers.values())


@pytest.mark.slow
def test_layers_with_windows_and_caps_see_what_the_whole_graph_sees(tiny_heads: Path, tmp_path: Path):
    from medusa_deploy.export.exporter import export_bundle
    from support.families import FAMILIES, make_family

    model = make_family(FAMILIES["gemma2: windows, soft caps of scores and of logits"], tmp_path / "model")
    export_bundle(model, tiny_heads, tmp_path / "bundle", capacity=64, top_k=4)
    bundle = open_bundle(tmp_path / "bundle")
    whole, layers = Calibrator(bundle, threads=1), LayerCalibrator(bundle, threads=1)
    texts = random_prompts(VOCAB, 48, 3, seed=2)
    names = [matmul.activation for stage in layers.stages[:-1] for matmul in stage.matmuls]
    assert_same(layers.measure(texts, ()).seen, whole.collect(texts, 1), list(dict.fromkeys(names)))
