"""quantise: from a bundle and its scales to a further variant that runs; a bundle that can't take one stays as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from medusa_deploy.export.quantise.cpu import BLOCKS, PRECISIONS
from medusa_deploy.runtime.files.bundle import locked, open_bundle
from medusa_deploy.runtime.session import load
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.measure.kl import Divergence
from medusa_deploy.tools.prompt_source import random_prompts
from medusa_deploy.tools.verbs import quantise as verb
from support.tiny import VOCAB

PROMPTS = random_prompts(VOCAB, 256, 6, seed=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def scales(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in PROMPTS), "utf-8")
    options = ["--data", str(folder / "prompts.jsonl"), "--max-new-tokens", "16", "--threads", "1"]
    assert main(["calibrate", str(tiny_bundle), *options, "-o", str(folder / "scales.json")]) == 0
    return folder / "scales.json"


def test_a_copy_of_hard_links_changes_and_its_original_does_not(tiny_bundle: Path, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy", copy_function=os.link))
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in sorted(tiny_bundle.rglob("*")) if path.is_file()}
    for options in ([], ["--force"]):
        assert main(["quantise", str(copy), "--threads", "1", *options]) == 0
    prompt = PROMPTS[0][:8]
    assert load(copy, variant="cpu-int8", threads=1).generate(token_ids=prompt, max_new_tokens=4).token_ids
    assert main(["inspect", str(copy)]) == 0 and main(["inspect", str(tiny_bundle)]) == 0
    after = {path: (path.read_bytes(), path.stat().st_mode) for path in sorted(tiny_bundle.rglob("*")) if path.is_file()}
    assert after == before


def test_the_choices_of_the_help_are_those_that_there_are():
    assert verb.BITS == PRECISIONS and verb.BLOCKS == BLOCKS


def test_8_bits_with_scales_are_a_variant_of_the_bundle(
    bundle_copy: Path, scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "report.json"
    assert main(["quantise", str(bundle_copy), "--scales", str(scales), "--threads", "1", "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "cpu-int8 (onnx/step.cpu-int8.onnx)" in shown and "smoothed" in shown
    made = json.loads(report.read_text("utf-8"))
    assert made["variant"] == "cpu-int8" and made["products"] == {"4": 0, "8": sum(made["products"].values()), "32": 0}
    assert made["scales"]["model_sha256"], "whose scales they were"
    reference, session = (load(bundle_copy, variant=variant, threads=1) for variant in ("cpu", "cpu-int8"))
    divergence, agreement = Divergence(reference, PROMPTS, 12, threads=1).of_session(session)
    assert 0 < divergence < 3e-3 and agreement > 0.9
    assert main(["quantise", str(bundle_copy), "--threads", "1"]) == 1, "it is there already"
    options = ["--count", "1", "--max-new-tokens", "8", "--repeats", "1"]
    assert main(["bench", str(bundle_copy), "--variant", "cpu-int8", *options]) == 0


def test_scales_still_belong_to_the_bundle_when_it_has_a_variant_more(bundle_copy: Path, scales: Path):
    assert main(["quantise", str(bundle_copy), "--scales", str(scales), "--threads", "1"]) == 0
    assert main(["quantise", str(bundle_copy), "--scales", str(scales), "--name", "cpu-other", "--block", "16"]) == 0
    assert {"cpu-int8", "cpu-other"} < set(open_bundle(bundle_copy).manifest.variants)


def test_a_budget_keeps_more_bits_where_they_are_needed(bundle_copy: Path, data: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    options = ["--bits", "4", "--data", str(data), "--samples", "4", "--threads", "1", "--json", str(report)]
    assert main(["quantise", str(bundle_copy), *options]) == 0
    loose = json.loads(report.read_text("utf-8"))
    assert loose["variant"] == "cpu-int4" and loose["kept"] == {}
    assert main(["quantise", str(bundle_copy), *options, "--name", "cpu-tight", "--budget", "0.01"]) == 0
    tight = json.loads(report.read_text("utf-8"))
    assert tight["divergence"] <= 0.01 and tight["kept"] and set(tight["kept"].values()) == {8}
    assert set(tight["kept"]) <= set(tight["most_sensitive"]) and loose["bytes_after"] < tight["bytes_after"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--name", "int8"], 1, "a variant can't be called 'int8'"),
        (["--bits", "32", "--projection-bits", "32", "--heads-bits", "32"], 1, "nothing is quantised"),
        (["--budget", "0"], 1, "over the budget of 0"),
        (["--scales", "nowhere.json"], 1, "nowhere.json can't be read"),
        (["--bits", "5"], 2, "invalid choice"),
    ],
)
def test_what_cant_be_done_leaves_the_bundle_as_it_was(
    options: list[str], code: int, message: str, bundle_copy: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted((path, path.stat().st_size) for path in bundle_copy.rglob("*"))
    assert main(["quantise", str(bundle_copy), "--data", str(data), "--threads", "1", *options]) == code
    assert message in capsys.readouterr().err
    assert sorted((path, path.stat().st_size) for path in bundle_copy.rglob("*")) == before


def test_two_at_a_time_are_refused(bundle_copy: Path, capsys: pytest.CaptureFixture[str]):
    with locked(bundle_copy):
        assert main(["quantise", str(bundle_copy)]) == 1
    assert "at work in" in capsys.readouterr().err
