"""``scales.json`` is read back unchanged, refused by rule, and bound to one model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import ScalesError, ScalesMismatchError
from medusa_deploy.runtime.files.manifest import FileRecord
from medusa_deploy.runtime.files.scales_file import ActivationScale, Layer, Scales, Smoothing, Taker, model_digest, read_scales
from support.records import manifest

LAYERS = {"q": Layer("x", "w", 1), "k": Layer("x", "v", 0)}


def scales(maxima: list[float] | None = None) -> Scales:
    values = np.array(maxima or [0.0, 3.25, 1e-20], np.float32)
    return Scales(
        "max",
        LAYERS,
        {"x": ActivationScale(0.5, 63.5, 200, 0.0, 0.25, 0.01, values)},
        {("w", 1): np.array([0.1, 0.2], np.float32), ("v", 0): np.array([1.0], np.float32)},
        {"model_sha256": model_digest(manifest()), "prompts": 3},
        {
            "x": {
                "block": Smoothing(0.6, 1e-5, 2e-5, np.full(len(values), 0.1, np.float32)),
                "tensor": Smoothing(None, 1e-3, 1e-3, np.ones(len(values), np.float32)),
            }
        },
        {"x": Taker("values", "q", 1, len(values))},
    )


def changed(path: Path, edit: dict[str, Any]) -> Path:
    """Replaces fields of ``path``. A dotted name goes down."""
    raw = json.loads(path.read_text("utf-8"))
    for name, value in edit.items():
        *above, last = name.split(".")
        place = raw
        for key in above:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = value
    path.write_text(json.dumps(raw), "utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "scales.json"
    file.write_text(scales().to_json(), "utf-8")
    return file


def test_scales_are_read_back_and_found_by_layer(path: Path):
    read = read_scales(path, manifest())
    assert read.to_json() == scales().to_json()
    activation, weights = read.of_layer("k")
    assert (activation.scale, weights.tolist()) == (0.5, [1.0])
    with pytest.raises(ScalesError, match="no scales for the layer 'o': 2 others") as caught:
        read.of_layer("o")
    assert "calibrate" in caught.value.hint


def test_factors_are_read_back_and_where_there_is_no_alpha_all_are_1(path: Path):
    assert "factors" not in json.loads(path.read_text("utf-8"))["smoothing"]["x"]["tensor"]
    read = read_scales(path, manifest()).smoothing["x"]
    assert read["block"].factors.tolist() == np.full(3, 0.1, np.float32).tolist()
    assert (read["tensor"].alpha, read["tensor"].factors.tolist()) == (None, [1.0] * 3)


def test_files_of_the_first_schema_have_no_smoothing(path: Path):
    raw = json.loads(path.read_text("utf-8"))
    del raw["smoothing"], raw["takers"]
    path.write_text(json.dumps({**raw, "schema_version": 1}), "utf-8")
    assert read_scales(path, manifest()).smoothing == {}


def test_files_of_older_versions_do_not_say_what_takes_factors(path: Path):
    assert read_scales(path, manifest()).takers == {"x": Taker("values", "q", 1, 3)}
    raw = json.loads(path.read_text("utf-8"))
    del raw["takers"]
    path.write_text(json.dumps(raw), "utf-8")
    read = read_scales(path, manifest())
    assert read.takers == {} and set(read.smoothing) == {"x"}


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_survive_the_file_bit_by_bit(maxima: list[float]):
    written = json.loads(scales(maxima).to_json())["activations"]["x"]["channel_maxima"]
    assert np.array(written, np.float32).tolist() == np.float32(maxima).tolist()


@pytest.mark.parametrize(
    "edit",
    [
        {"schema_version": 0},
        {"schema_version": "1"},
        {"layers": []},
        {"layers.q.activation": "y"},
        {"layers.q.axis": 0},
        {"layers.q.more": 1},
        {"activations.x.scale": 0},
        {"activations.x.scale": -1.0},
        {"activations.x.scale": 1e-39},
        {"activations.x.scale": float("nan")},
        {"activations.x.scale": float("inf")},
        {"activations.x.scale": "1"},
        {"activations.x.channel_maxima": [1, -1]},
        {"activations.x.channel_maxima": []},
        {"weights.0.scales": [1e-39]},
        {"weights.0.scales": [[1.0]]},
        {"weights.0.scales": [1e39]},
        {"weights.0.name": "u"},
        {"weights": {}},
        {"provenance": {}},
        {"smoothing": []},
        {"smoothing.y": {}},
        {"smoothing.x": {}},
        {"smoothing.x.block.factors": [1.0, 1.0]},
        {"smoothing.x.block.factors": [1.0, 0.0, 1.0]},
        {"smoothing.x.block.alpha": None},
        {"smoothing.x.block.alpha": 1.5},
        {"smoothing.x.block.error": float("nan")},
        {"smoothing.x.tensor.alpha": 0.5},
        {"smoothing.x.tensor.more": 1},
        {"takers": []},
        {"takers.y": {"kind": "norm", "name": "w"}},
        {"takers.x": {"kind": "gate", "name": "q"}},
        {"takers.x": {"kind": "norm", "name": 1}},
        {"takers.x": {"kind": "norm", "name": "w", "heads": 3}},
        {"takers.x": {"kind": "layer", "name": "o"}},
        {"takers.x.name": []},
        {"takers.x.heads": 2},
        {"takers.x.queries": 0},
        {"takers.x.queries": 1.5},
        {"takers.x.more": 1},
    ],
    ids=str,
)
def test_what_breaks_a_rule_is_refused(path: Path, edit: dict[str, Any]):
    with pytest.raises(ScalesError, match="holds no scales") as caught:
        read_scales(changed(path, edit), manifest())
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 1', "\0", "[" * 100_000, "{}"])
def test_what_is_no_file_of_scales_is_refused(path: Path, text: str):
    path.write_text(text, "utf-8")
    with pytest.raises(ScalesError):
        read_scales(path, manifest())
    with pytest.raises(ScalesError, match="can't be read"):
        read_scales(path.parent / "none.json", manifest())


def test_a_newer_schema_is_refused_by_its_number(path: Path):
    with pytest.raises(ScalesError, match="schema version 3; this program reads up to 2"):
        read_scales(changed(path, {"schema_version": 3, "layers": "of another form"}), manifest())


def test_scales_of_another_model_are_refused_and_engines_and_variants_make_no_other_model(path: Path):
    mine = manifest()
    more = {**mine.files, "engines/sm_89/engine.json": FileRecord(1, "1" * 64), "tokenizer.json": FileRecord(1, "2" * 64)}
    more["onnx/int8/weights.bin"] = FileRecord(1, "3" * 64)
    read_scales(path, replace(mine, files=more))
    for name in ("onnx/weights.bin", "onnx/step.onnx"):
        other = replace(mine, files={**mine.files, name: FileRecord(1, "1" * 64)})
        with pytest.raises(ScalesMismatchError, match="measured on the model"):
            read_scales(path, other)
