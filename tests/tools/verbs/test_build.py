"""The verb build: what it prints and its exit codes; the builder itself is a fake one here."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.export import exporter
from medusa_deploy.export.engines.build import plan_engines
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.tools import cli
from medusa_deploy.tools.console import Progress
from medusa_deploy.tools.verbs import build
from support.fake_tensorrt import FakeTensorRT, fake_tensorrt, half_precision_bundle, state


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorRT]:
    return fake_tensorrt(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return half_precision_bundle(tmp_path / "bundle")


def test_the_verb_builds_and_reports(bundle: Path, made: type[FakeTensorRT], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", str(bundle), "--target", "sm_89,SM_86", "--rows", "1,8"]) == 0
    shown = capsys.readouterr().out
    assert "sm_89" in shown
    assert "sm_86" in shown
    assert cli.main(["build", str(bundle), "--target", "sm_89", "--rows", "1,8", "--resume"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert cli.main(["build", str(bundle), "--target", "sm_89"]) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["inspect", str(bundle)]) == 0
    assert "sm_86 (engines/sm_86/engine.json)" in capsys.readouterr().out


def test_a_copy_of_hard_links_gets_engines_and_its_original_none(bundle: Path, made: type[FakeTensorRT], tmp_path: Path) -> None:
    assert cli.main(["build", str(bundle), "--target", "sm_89", "--rows", "1"]) == 0
    copy = Path(shutil.copytree(bundle, tmp_path / "copy", copy_function=os.link))
    before = state(bundle)
    assert cli.main(["build", str(copy), "--target", "sm_86", "--rows", "1"]) == 0
    assert cli.main(["build", str(copy), "--target", "sm_89", "--rows", "1,8", "--force"]) == 0
    assert state(bundle) == before
    assert cli.main(["inspect", str(bundle)]) == cli.main(["inspect", str(copy)]) == 0


def test_a_dry_run_builds_nothing(bundle: Path, made: type[FakeTensorRT], capsys: pytest.CaptureFixture[str]) -> None:
    before = state(bundle)
    assert cli.main(["build", str(bundle), "--target", "sm_89", "--dry-run"]) == 0
    assert "rows-16" in capsys.readouterr().out
    assert state(bundle) == before
    assert plan_engines(bundle, ["sm_89"]).targets == ("sm_89",)


@pytest.mark.parametrize("options", [["--target", ","], ["--target", "sm_89", "--rows", "1,x"], []])
def test_wrong_usage_of_the_verb(bundle: Path, options: list[str]) -> None:
    assert cli.main(["build", str(bundle), *options]) == 2


def test_a_dry_run_says_what_int8_saves(bundle: Path, made: type[FakeTensorRT], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for precision in ("fp16", "int8"):
        assert cli.main(["build", str(bundle), "--target", "sm_89", "--precision", precision, "--dry-run", "--json", "-"]) == 0
        sizes[precision] = json.loads(capsys.readouterr().out)["weights_bytes"]
    assert sizes["fp16"] == 2 * 2 * 128 * 256
    assert sizes["int8"] == 2 * (128 * 256 + 2 * 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "streamed", "--precision", "int8"], ["inputs", "--weights inside"]),
        (["--hardware-compatible"], ["tensorrt-rtx has no hardware-compatible", "leave --hardware-compatible out"]),
        (["--timing-cache", "cache"], ["no timing-cache"]),
        (["--refittable"], ["--target here"]),
        (["--rows", "4096"], ["4096", "--max-rows"]),
        (["-o", "elsewhere"], ["--output", "isn't a checkpoint"]),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_hint(
    bundle: Path, made: type[FakeTensorRT], options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(bundle), "--target", "sm_89", *options]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in [*words, "hint:"]), said
    assert not made.requests


def test_features_reach_the_builder_and_the_record(bundle: Path, made: type[FakeTensorRT]) -> None:
    options = [
        "--backend",
        "tensorrt",
        "--hardware-compatible",
        "--version-compatible",
        "--refittable",
        "--timing-cache",
        "cache",
    ]
    assert cli.main(["build", str(bundle), "--target", "sm_90", *options]) == 0
    request = made.requests[0]
    assert request.features == ("hardware-compatible", "refittable", "timing-cache", "version-compatible")
    assert request.timing_cache is not None
    assert Path(request.timing_cache).is_absolute()


def test_a_checkpoint_is_exported_first(
    tiny_model: Path,
    made: type[FakeTensorRT],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported: list[dict[str, Any]] = []

    def export(model: Path, heads: Path | None, output: Path, **options: Any) -> dict[str, Any]:
        exported.append({"model": model, "heads": heads, **options})
        half_precision_bundle(output)
        return {"warnings": ["of the export"]}

    monkeypatch.setattr(exporter, "export_bundle", export)
    output = tmp_path / "bundle"
    command = ["build", str(tiny_model), "--target", "sm_89", "-o", str(output), "--batch", "2"]
    assert cli.main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would export  TinyLlama" in shown or "LlamaForCausalLM" in shown
    assert "sm_89" in shown
    assert not exported
    assert cli.main(command) == 0
    assert (exported[0]["dtype"], exported[0]["batch"]) == ("fp16", 2)
    assert set(open_bundle(output).manifest.engines) == {"sm_89"}
    assert "warning: of the export" in capsys.readouterr().err
    assert cli.main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["build", str(tiny_model), "--target", "sm_89"]) == 1
    assert "-o BUNDLE" in capsys.readouterr().err
    assert cli.main(["build", str(tiny_model), "--target", "mars", "-o", str(tmp_path / "other")]) == 1
    assert len(exported) == 1, "a wrong target is said before the export"


def test_what_is_in_int8_is_checked_before_anything_is_built(
    bundle: Path, tiny_model: Path, made: type[FakeTensorRT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(bundle), "--target", "sm_89"]
    for options, said in (
        (["--scales", "scales.json"], "--precision int8"),
        (["--precision", "int8", "--scales", str(tmp_path / "none")], "can't be read"),
        (["--precision", "int8", "--keep", "down"], "--scales"),
        (["--heads-precision", "fp16"], "--precision int8"),
    ):
        assert cli.main([*command, *options]) == 1
        assert said in capsys.readouterr().err
    assert cli.main(["build", str(tiny_model), "--target", "sm_89", "-o", str(tmp_path / "new"), "--scales", "s"]) == 1
    assert "calibrate" in capsys.readouterr().err
    assert not made.requests


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_phase_profile_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(Progress, "_interval", 0.0)
    now = [100.0]
    monkeypatch.setattr(build.time, "monotonic", lambda: now[0])
    terminal = Terminal()
    with Progress("starting", stream=terminal) as progress:
        shown = build._Shown(progress)
        shown.report("sm_89: building")
        now[0] = 110.0
        shown.advance("Parsing", 0, 4)
        now[0] = 140.0
        shown.advance("Computing profile costs", 2, 4)
        now[0] = 145.0
        shown.advance("Computing profile costs", 2, 4)
    lines = terminal.getvalue().split("\r")
    assert any("sm_89: building  profile 1 of 4  10.0 s  parsing" in line for line in lines)
    assert any("profile 3 of 4  ETA 40.0 s" in line for line in lines)
    assert any("profile 3 of 4  ETA 35.0 s" in line for line in lines), "it runs down between the builder's words"
