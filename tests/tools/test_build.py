"""The verb build: what it prints and its exit codes; the builder itself is a fake one here."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.export.engine import plan_engines
from medusa_deploy.tools import cli
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


def test_a_dry_run_builds_nothing(bundle: Path, made: type[FakeTensorRT], capsys: pytest.CaptureFixture[str]) -> None:
    before = state(bundle)
    assert cli.main(["build", str(bundle), "--target", "sm_89", "--dry-run"]) == 0
    assert "rows-16" in capsys.readouterr().out
    assert state(bundle) == before
    assert plan_engines(bundle, ["sm_89"]).targets == ("sm_89",)


@pytest.mark.parametrize("options", [["--target", ","], ["--target", "sm_89", "--rows", "1,x"], []])
def test_wrong_usage_of_the_verb(bundle: Path, options: list[str]) -> None:
    assert cli.main(["build", str(bundle), *options]) == 2
