"""calibrate: from a file of prompts or text to scales that the reader takes; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from medusa_deploy.calibration.int8 import collect, samples
from medusa_deploy.calibration.int8.matmuls import StepGraph
from medusa_deploy.calibration.int8.ranges import METHODS
from medusa_deploy.runtime.errors import CalibrationError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.scales_file import read_scales
from medusa_deploy.runtime.session import load
from medusa_deploy.runtime.text.prompts import prompts_digest, read_prompts
from medusa_deploy.tools import machine
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.making.scales import calibrate
from medusa_deploy.tools.making.scales_report import describe
from medusa_deploy.tools.prompt_source import packaged_prompts, random_prompts
from medusa_deploy.tools.verbs import calibrate as verb
from support.text import encode, text_bundle
from support.tiny import VOCAB

PROMPTS = random_prompts(VOCAB, 256, 5, seed=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="module", name="text_bundle")
def _text_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("text") / "bundle")


def options(data: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(data), "-o", str(output), "--max-new-tokens", "16", "--threads", "1", *more]


def test_the_methods_of_the_help_are_those_that_there_are():
    assert tuple(METHODS) == verb.METHODS


@pytest.mark.parametrize("method", verb.METHODS)
def test_the_verb_writes_scales_that_the_reader_takes(
    method: str, tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, report = tmp_path / "out" / "scales.json", tmp_path / "report.json"
    assert main(["calibrate", str(tiny_bundle), *options(data, output, "--method", method, "--json", str(report))]) == 0
    shown = capsys.readouterr()
    assert "prefill rows" in shown.out
    assert shown.err == ""
    scales = read_scales(output, open_bundle(tiny_bundle).manifest)
    assert scales.method.startswith(method)
    assert scales.provenance["data_sha256"] == prompts_digest(PROMPTS)
    assert json.loads(report.read_text("utf-8"))["provenance"]["tree_rows"] > 0
    assert [entry.name for entry in output.parent.iterdir()] == ["scales.json"]
    assert all(entry.scale <= entry.largest / 127 * 1.000001 for entry in scales.activations.values())


def test_what_smoothing_does_is_chosen_and_reported(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = {}
    for smooth in ("auto", "off", "0.5"):
        output, report = tmp_path / f"{smooth}.json", tmp_path / f"{smooth}.report"
        assert main(["calibrate", str(tiny_bundle), *options(data, output, "--smooth", smooth, "--json", str(report))]) == 0
        found[smooth] = read_scales(output, open_bundle(tiny_bundle).manifest).smoothing
        assert ("tensor grid" in capsys.readouterr().out) == (smooth != "off")
        assert set(json.loads(report.read_text("utf-8"))["smoothing"]) == (set() if smooth == "off" else {"block", "tensor"})
    assert found["off"] == {}
    assert len(found["auto"]) == len(found["0.5"]) == 8, "two norms, an up product and values of each layer"
    for name, grids in found["auto"].items():
        for grid, entry in grids.items():
            assert entry.error <= min(entry.unsmoothed_error, found["0.5"][name][grid].error)
            assert found["0.5"][name][grid].alpha == 0.5 or (grid == "block" and entry.alpha is None)
    assert sum(grids["block"].alpha == 0.5 for grids in found["0.5"].values()) == 6, "the CPU's graph has none for values"
    for bad in ("1.1", "nan", "half"):
        assert main(["calibrate", str(tiny_bundle), *options(data, tmp_path / "bad", "--smooth", bad)]) == 2


def test_existing_scales_are_kept_without_force(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "scales.json"
    output.write_text("mine")
    assert main(["calibrate", str(tiny_bundle), *options(data, output)]) == 1
    assert "--force" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["calibrate", str(tiny_bundle), *options(data, output, "--force")]) == 0
    assert read_scales(output, open_bundle(tiny_bundle).manifest)


def test_an_interrupted_run_leaves_no_scales_and_the_next_one_goes_on(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, output = tmp_path / "whole.json", tmp_path / "out" / "scales.json"
    assert main(["calibrate", str(tiny_bundle), *options(data, whole)]) == 0
    observe, calls = collect.Calibrator._observe, []

    def counted(self: collect.Calibrator, prompt: list[int], new_tokens: int) -> object:
        calls.append(prompt)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return observe(self, prompt, new_tokens)

    monkeypatch.setattr(collect.Calibrator, "_observe", counted)
    assert main(["calibrate", str(tiny_bundle), *options(data, output)]) == 130
    assert [entry.name for entry in output.parent.iterdir()] == ["scales.json.progress"]
    assert main(["calibrate", str(tiny_bundle), *options(data, output)]) == 0
    assert calls == [*PROMPTS[:3], *PROMPTS[2:]]
    assert output.read_bytes() == whole.read_bytes()
    assert [entry.name for entry in output.parent.iterdir()] == ["scales.json"]


def test_a_disk_that_refuses_leaves_nothing_behind(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    assert main(["calibrate", str(tiny_bundle), *options(data, tmp_path / "file" / "scales.json")]) == 1
    assert "can't write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("none.jsonl", None, "can't read"),
        ("none.txt", None, "can't read"),
        ("bad.jsonl", b"once upon a time\n", "line 1 is not JSON"),
        ("other.jsonl", b'{"text": "once"}\n', "unknown fields"),
        ("image.txt", b"\x89PNG\r\n", "is not text: byte 0"),
        ("zero.txt", b"a\0b", "zero byte"),
        ("empty.txt", b"\n\n", "holds 0 samples"),
        ("short.txt", b"one\n\ntwo", "holds 2 samples, asked for 3"),
        ("short.jsonl", b'{"prompt": "one"}\n', "holds 1 samples, asked for 3"),
    ],
)
def test_data_that_is_neither_text_nor_prompts_is_refused(
    name: str, content: bytes | None, what: str, text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, output = tmp_path / name, tmp_path / "scales.json"
    if content is not None:
        path.write_bytes(content)
    more = ["--samples", "3"] if "short" in name else []
    assert main(["calibrate", str(text_bundle), *options(path, output, *more)]) == 1
    shown = capsys.readouterr().err
    assert what in shown
    assert "hint: " in shown
    assert not list(tmp_path.glob("*scales*"))


def test_prompts_that_do_not_fit_and_too_few_rows_are_refused(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "scales.json"
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"token_ids": [1] * 250}), "utf-8")
    assert main(["calibrate", str(tiny_bundle), *options(long, output)]) == 1
    assert "exceed the capacity of 256" in capsys.readouterr().err
    assert main(["calibrate", str(tiny_bundle), *options(data, output, "--samples", "1")]) == 1
    assert "scales need 128" in capsys.readouterr().err
    assert not output.exists()


def test_text_is_cut_into_paragraphs_and_pieces_that_fit(text_bundle: Path, tiny_bundle: Path, tmp_path: Path):
    session = load(text_bundle, threads=1)
    path = tmp_path / "book.txt"
    path.write_text(f"once\r\n\r\n\n\n{'ab' * 150}\n\nend\n", "utf-8")
    long = encode("ab" * 150)
    assert samples.read_samples(session, path, None, 56) == [encode("once"), long[:200], long[200:], encode("end")]
    assert samples.read_samples(session, path, 1, 56) == [encode("once")]
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        samples.read_samples(load(tiny_bundle, threads=1), path, None, 56)


def test_a_few_prompts_are_of_all_categories(text_bundle: Path, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    kinds = ["prose"] * 3 + [None, "code", "prose", "code"]
    lines = [{"token_ids": [10 + at], **({"category": kind} if kind else {})} for at, kind in enumerate(kinds)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    session = load(text_bundle, threads=1)
    assert samples.read_samples(session, path, 4, 8) == [[10], [13], [14], [11]]
    assert samples.read_samples(session, path, None, 8) == [[10], [13], [14], [11], [16], [12], [15]]
    packaged = samples.categories_in_turn(read_prompts(packaged_prompts("train")))
    assert len({line.category for line in packaged[:8]}) == 8, "every kind of prompt is in the first few"


def test_without_data_the_packages_prompts_are_taken(text_bundle: Path, tmp_path: Path):
    (tmp_path / "short.jsonl").write_text("")
    output = tmp_path / "scales.json"
    scales = calibrate(text_bundle, output, samples=2, max_new_tokens=4, threads=1)
    assert scales.provenance["prompts"] == 2
    assert scales.provenance["prefill_rows"] > 20


def test_layer_by_layer_writes_scales_of_the_same_things_and_quantise_takes_them(
    tiny_bundle: Path, bundle_copy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole, output, report = tmp_path / "whole.json", tmp_path / "layers.json", tmp_path / "report.json"
    assert main(["calibrate", str(tiny_bundle), *options(data, whole, "--no-layer-by-layer")]) == 0
    more = ["--layer-by-layer", "--threads", "1", "--json", str(report)]
    capsys.readouterr()
    assert main(["calibrate", str(tiny_bundle), "--data", str(data), "-o", str(output), *more]) == 0
    assert "layer by layer (as asked): prompts were read and not answered" in capsys.readouterr().out
    one, other = (read_scales(path, open_bundle(tiny_bundle).manifest) for path in (whole, output))
    assert one.layers == other.layers
    for part in ("activations", "weights", "smoothing"):
        assert list(getattr(one, part)) == list(getattr(other, part))
    facts = json.loads(report.read_text("utf-8"))["provenance"]
    assert (facts["layer_by_layer"], facts["tree_rows"], facts["cut_texts"]) == (True, 0, 0)
    assert facts["prefill_rows"] == sum(map(len, PROMPTS))
    again = tmp_path / "again.json"
    assert main(["calibrate", str(tiny_bundle), "--data", str(data), "-o", str(again), *more]) == 0
    assert again.read_bytes() == output.read_bytes()
    assert not list(tmp_path.glob("*.progress"))
    assert main(["quantise", str(bundle_copy), "--scales", str(output)]) == 0


def test_a_model_too_large_for_memory_is_calibrated_layer_by_layer_and_the_output_says_so(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = StepGraph(open_bundle(tiny_bundle)).weights_bytes()
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert weights == 4 * (2 * layer + 3 * 64 * 64 + 3 * 64 * VOCAB), "the vocabulary has three: embedding, projection, heads"
    for available, expected in ((2 * weights, False), (2 * weights - 1, True), (0, False)):
        monkeypatch.setattr(machine, "memory_bytes", lambda available=available: (1 << 40, available))
        scales = calibrate(tiny_bundle, tmp_path / "scales.json", data, smooth="off", threads=1, force=True)
        assert scales.provenance.get("layer_by_layer", False) == expected
        assert ("more than half of the memory" in describe(scales)) == expected


def test_new_tokens_are_refused_where_nothing_is_answered(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "scales.json"
    assert main(["calibrate", str(tiny_bundle), *options(data, output, "--layer-by-layer")]) == 1
    assert "16 new tokens are asked for" in capsys.readouterr().err
    assert (
        main(["calibrate", str(tiny_bundle), "--data", str(data), "-o", str(output), "--layer-by-layer", "--samples", "1"]) == 1
    )
    assert "scales need 128" in capsys.readouterr().err
    assert not output.exists()


def test_layer_by_layer_texts_are_cut_where_a_slot_ends(tiny_bundle: Path, tmp_path: Path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"token_ids": [1, *range(3, 128)] * 3}) + "\n", "utf-8")
    scales = calibrate(tiny_bundle, tmp_path / "scales.json", long, smooth="off", layer_by_layer=True, threads=1)
    assert (scales.provenance["prefill_rows"], scales.provenance["cut_texts"]) == (256, 1)
    assert "1 cut to 256 tokens" in describe(scales)
