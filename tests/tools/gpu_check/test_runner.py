"""The runner of gpu_check: stages in processes of their own, one report for all calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_deploy.tools.gpu_check import runner
from medusa_deploy.tools.gpu_check.options import Options, parse

BASIC = ["--device", "cpu", "--sizes", "tiny", "--repeats", "2", "--rows", "1,16,64"]


def options_for(out: Path, *more: str) -> Options:
    return parse(["--out", str(out), *BASIC, *more])


@pytest.mark.slow
def test_calls_add_to_one_report_and_write_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for stage in ("memory", "sizes"):
        assert runner.main(["--out", str(out), *BASIC, "--stages", stage, "--strict"]) == 0
    report = json.loads((out / "gpu_check.json").read_text())
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {"memory": "ok", "sizes": "ok"}
    assert report["schema_version"] == 1 and report["machine"]["cores"] >= 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.txt"]
    assert capsys.readouterr().out.endswith((out / "gpu_check.txt").read_text())


def test_a_stage_that_takes_too_long_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), *BASIC, "--stages", "memory,curve", "--limit", "0.3"]
    assert runner.main(arguments) == 0
    stages = json.loads((tmp_path / "gpu_check.json").read_text())["stages"]
    for name in ("memory", "curve"):
        assert (stages[name]["status"], stages[name]["error"]["message"]) == ("failed", "stopped after 0.3 s")
    assert runner.main([*arguments, "--strict"]) == 1


def test_what_a_stage_found_before_it_ended_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(tmp_path)

    def died(found: Options, stage: str) -> list[str]:
        report = {"status": "running", "results": {"7b": 1}, "skipped": {}, "wrong": {}, "error": None}
        program = (
            f"import json, pathlib; pathlib.Path({str(tmp_path)!r}, '.{stage}.json').write_text({json.dumps(report)!r}); exit(9)"
        )
        return ["-c", program]

    monkeypatch.setattr(runner, "command_line", died)
    monkeypatch.setattr(runner, "_PROGRAM", [])
    entry = runner._run_apart("curve", options)
    assert (entry["status"], entry["results"]) == ("partial", {"7b": 1})
    assert entry["error"] == {"exception": "StageEnded", "message": "the process ended with code 9"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert runner.main(["--out", str(tmp_path / "file"), *BASIC, "--stages", "memory"]) == 1
    assert "error: can't write" in capsys.readouterr().err
