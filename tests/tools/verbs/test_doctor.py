"""What doctor finds, on this machine and on broken ones."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from medusa_deploy.runtime.errors import MissingDependencyError
from medusa_deploy.tools import extras, machine
from medusa_deploy.tools.cli import USER_ERROR, main
from medusa_deploy.tools.verbs import doctor

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def _names(requirements: list[str], table: dict[str, list[str]]) -> set[str]:
    """Distribution names, the project's own extras resolved."""
    found: set[str] = set()
    for requirement in requirements:
        own = re.fullmatch(r"medusa-deploy\[(.+)\]", requirement)
        found |= _names(table[own[1]], table) if own else set(re.findall(r"^[\w.-]+", requirement))
    return found


def _pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Other versions of some distributions (None: not installed)."""
    real = extras.version
    monkeypatch.setattr(extras, "version", lambda name: versions.get(name, real(name)))


def test_a_machine_that_runs_these_tests_runs_bundles(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Bundles run here." in shown or "note: " in shown
    assert "CPUExecutionProvider" in shown


def test_the_report_is_json_with_versions_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    main(["doctor", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["cores"] >= 1
    assert report["memory_bytes"] >= report["memory_available_bytes"] > 0
    assert report["packages"]["numpy"] == extras.version("numpy")
    assert "CPUExecutionProvider" in report["providers"]


def test_without_onnxruntime_bundles_do_not_run_and_doctor_says_how_they_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["doctor"]) == USER_ERROR
    shown = capsys.readouterr().out
    assert "error: onnxruntime can't be imported" in shown
    assert "pip install 'medusa-deploy[cpu]'" in shown


def test_an_old_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, onnxruntime="1.29.1", numpy="2.0.0rc1")
    report = doctor.diagnose()
    assert not report["ok"]
    assert [entry["problem"] for entry in report["problems"]] == ["onnxruntime 1.29.1 is older than 1.30"]


def test_what_an_extra_lacks_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, torch=None, gguf=None)
    lacking = doctor.diagnose()["extras"]["export"]
    assert lacking["missing"] == ["gguf", "torch"]
    assert lacking["install"] == "pip install 'medusa-deploy[export]'"
    with pytest.raises(MissingDependencyError, match="needs gguf, torch") as caught:
        extras.require("export")
    assert "medusa-deploy[export]" in caught.value.hint


def test_another_build_of_onnxruntime_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, **{"onnxruntime": None, "onnxruntime-gpu": "1.32.0"})
    assert "onnxruntime" not in extras.missing("cpu")


def test_extras_and_oldest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    table = project["optional-dependencies"]
    assert {extra: set(names) for extra, names in extras.EXTRAS.items()} == {
        extra: _names(table[extra], table) for extra in extras.EXTRAS
    }
    for name, oldest in extras.OLDEST.items():
        assert any(
            re.match(rf"{name}>={'.'.join(map(str, oldest))}\b", entry) for entry in [*project["dependencies"], *table["cpu"]]
        )


def test_the_cache_is_shown_with_its_size_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path))
    (tmp_path / ("a" * 32)).mkdir()
    (tmp_path / ("a" * 32) / "1.bin").write_bytes(bytes(5 << 20))
    main(["doctor"])
    assert f"{tmp_path}: 5.0 MiB of at most 16.00 GiB" in capsys.readouterr().out
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", "much")
    assert main(["doctor"]) == USER_ERROR
    assert "MEDUSA_DEPLOY_CACHE_BYTES is 'much'" in capsys.readouterr().out


def test_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 6000 kB\n\nHugePages_Total: 0\n", "utf-8")
    for name, text in {"memory.max": "4096000\n", "memory.current": "96000\n", "cpu.max": "150000 100000\n"}.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.memory_bytes() == (4096000, 4000000)
    assert machine.core_quota() == 1.5
    (tmp_path / "memory.max").write_text("max\n", "utf-8")
    (tmp_path / "cpu.max").write_text("max 100000\n", "utf-8")
    assert machine.memory_bytes() == (8000 << 10, 6000 << 10)
    assert machine.core_quota() is None


def test_processor_facts_come_from_the_kernel_and_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_features() == []
    assert machine.cpu_model()
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : Fast 9000\nflags : fpu avx2 amx_int8 fma\n", "utf-8")
    assert machine.cpu_model() == "Fast 9000"
    assert machine.cpu_features() == ["avx2", "fma", "amx_int8"]
