"""gpu_check on a machine without a GPU: every stage on tiny shapes, what is kept when one fails, what is never said."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.tools.gpu_check import worker
from medusa_deploy.tools.gpu_check.machine import machine_facts
from medusa_deploy.tools.gpu_check.options import STAGES, Options, command_line, parse
from medusa_deploy.tools.gpu_check.report import OutOfTimeError, Report
from medusa_deploy.tools.gpu_check.shapes import SIZES
from medusa_deploy.tools.gpu_check.stages import doctor, overhead
from medusa_deploy.tools.gpu_check.table import describe_check
from medusa_deploy.tools.sizing.model_sizes import find_preset

BASIC = ["--device", "cpu", "--sizes", "tiny", "--repeats", "2", "--rows", "1,16,64"]


def options_for(out: Path, *more: str) -> Options:
    return parse(["--out", str(out), *BASIC, *more])


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All stages, run in this process, as the runner would merge them."""
    torch = pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("gpu_check")
    options = options_for(out, "--bundle", str(tiny_bundle))
    torch.set_num_threads(1)
    stages = {name: worker.run_stage(name, options).to_json() | {"device": "cpu"} for name in STAGES}
    return {"machine": machine_facts(), "stages": json.loads(json.dumps(stages))}


def test_sizes_are_those_that_plan_knows_and_need_no_torch() -> None:
    for name in {*SIZES} - {"tiny"}:
        assert SIZES[name].model == find_preset(name).shape
    code = "import sys, medusa_deploy.tools.gpu_check.options; print({'torch', 'onnxruntime', 'transformers'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.slow
def test_every_stage_measures_what_it_can(measured: dict[str, Any]) -> None:
    stages = measured["stages"]
    assert {name: (stage["error"], stage["wrong"]) for name, stage in stages.items()} == dict.fromkeys(STAGES, (None, {}))
    assert [name for name, stage in stages.items() if stage["status"] == "ok"] == ["memory", "sizes", "overhead", "breakdown"]
    assert stages["cuda-7b"]["status"] == "partial" and set(stages["cuda-7b"]["results"]) == {"made", "memory", "fp16", "int8"}
    for name in ("doctor", "exact", "curve", "batch"):
        assert "executor cuda" in stages[name]["skipped"], "the executor for a GPU is skipped, with the reason"
    results = {name: stage["results"] for name, stage in stages.items()}
    assert "cpu" in results["doctor"]["executors"] and results["doctor"]["imports"]["torch"] == "ok"
    ways = results["exact"]["torch"]["ways"]
    assert set(ways) == {"fused attention", "attention by products"}
    for found in ways.values():
        assert {kind: entry["equal"] for kind, entry in found.items()} == dict.fromkeys(("none", "own", "pruned", "shared"), True)
        assert found["none"]["tokens_per_step"] == 1 < found["own"]["tokens_per_step"]
    assert results["exact"]["executors"]["cpu"]["unexplained"] == 0
    assert results["exact"]["executors"]["cpu"]["against_expected"]["tokens_compared"] == 4 * 32
    assert set(results["curve"]["tiny"]["lengths"]["128"]) == {"1", "16", "64"}
    assert set(results["curve"]["executors"]["cpu"]) == {"context", "rounds", "ms_by_rows"}
    rows = results["batch"]["cpu"]["rows"]
    assert {count: set(by_slots) for count, by_slots in rows.items()} == {"1": {"1", "4"}, "16": {"1", "4"}}
    assert rows["1"]["4"]["tokens_per_s"] == pytest.approx(4e3 / rows["1"]["4"]["ms"])
    assert results["memory"]["tiny"]["weights_bytes"] == 4 * (SIZES["tiny"].step_parameters + (128 + 5) * 64)
    assert set(results["overhead"]["tiny"]["heads"]) == {"own", "shared", "pruned"}
    assert {"step", "attention", "projections", "mlp", "vocabulary", "rest", "heads own, one row"} <= set(
        results["breakdown"]["tiny"]["rows"]["64"]
    )
    for found in (*results["sizes"]["tiny"]["lengths"].values(), *results["breakdown"]["tiny"]["host"].values()):
        assert found["wall_ms_per_step"] > 0 and 0 <= found["host_fraction"] < 1
        assert 1 <= found["tokens_per_step"] <= 5


@pytest.mark.slow
def test_the_table_shows_every_stage_and_why_something_is_missing(measured: dict[str, Any]) -> None:
    text = describe_check(measured)
    for name in STAGES:
        assert f"\n{name} " in text
    for heading in (
        "exact: executor",
        "memory: size",
        "curve: ms",
        "batch: ms",
        "sizes: plain",
        "overhead: size",
        "breakdown: ms",
        "host fraction",
    ):
        assert heading in text
    assert "executor cuda: ProviderError" in text
    assert max(map(len, text.splitlines())) < 240


@pytest.mark.slow
def test_nothing_measured_is_called_a_speedup(measured: dict[str, Any]) -> None:
    assert "speedup" not in json.dumps(measured) and "speed-up" not in describe_check(measured)
    found = overhead.project(3.47, {"own": {"64": {"overhead": 1.25}}, "shared": {"32": {"overhead": 1.1}}})
    assert found["measured"] is False and "arXiv" in found["acceptance_source"]
    assert found["speedup_if_so"] == {"own": pytest.approx(2.776)}
    stage = {"device": "cuda", "status": "ok", "seconds": 1, "error": None, "skipped": {}, "wrong": {}}
    entry = {"heads": {"own": {"64": {"overhead": 1.25}}}, "projection": found}
    said = describe_check({**measured, "stages": {"overhead": {**stage, "results": {"7b": entry}}}})
    assert "projection, NOT measured, 7b at 3.47 tokens a step: own 2.78×\n  acceptance: arXiv" in said


def test_a_stage_leaves_gradients_as_they_were(tmp_path: Path) -> None:
    """Whoever runs a stage in a process of his own may train in it afterwards."""
    torch = pytest.importorskip("torch")
    worker.run_stage("exact", options_for(tmp_path))
    worker.run_stage("memory", options_for(tmp_path))
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_wrong_tokens_are_called_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    options = options_for(tmp_path, "--bundle", str(tiny_bundle))
    assert worker.run_stage("exact", options).status == "partial"
    brought = json.loads((tmp_path / "expected.json").read_text())
    assert brought["made_by"] == "the cpu executor"
    brought["tokens"][1][3] = (brought["tokens"][1][3] + 1) % 128
    (tmp_path / "other.json").write_text(json.dumps(brought))
    found = worker.run_stage("exact", dataclasses.replace(options, expected=tmp_path / "other.json"))
    assert found.status == "wrong" and "rounding doesn't explain" in found.wrong["executor cpu"]
    assert found.results["executors"]["cpu"]["against_expected"]["first_divergences"][0]["position"] == 3
    (tmp_path / "other.json").write_text("[]")
    refused = worker.run_stage("exact", dataclasses.replace(options, expected=tmp_path / "other.json"))
    assert refused.error is not None and refused.error["exception"] == "PromptFileError"


# -- one stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "ok"), (ValueError("broken"), "failed"), (OutOfTimeError("late"), "partial"), ("skip", "partial")],
)
def test_a_stage_keeps_its_results_and_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, status: str
) -> None:
    from medusa_deploy.tools.gpu_check.stages import memory

    def run(options: Options, report: Report) -> None:
        report.put("first", 1)
        if error == "skip":
            report.skip("second", "not here")
        elif error is not None:
            raise error

    monkeypatch.setattr(memory, "run", run)
    worker.run_stage("memory", options_for(tmp_path), tmp_path / "stage.json")
    found = json.loads((tmp_path / "stage.json").read_text())
    assert (found["status"], found["results"]) == (status, {"first": 1})
    if isinstance(error, Exception):
        assert found["error"] == {"exception": type(error).__name__, "message": f"{type(error).__name__}: {error}"}


def test_a_size_that_fails_does_not_keep_the_next_from_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig_module = pytest.importorskip("medusa_deploy.tools.gpu_check.torch_reference.rig")
    done: list[str] = []

    def measure(rig: Any, report: Report) -> None:
        if rig == "7b":
            raise RuntimeError("CUDA out of memory")
        done.append(rig)

    monkeypatch.setattr(rig_module, "Rig", lambda size, options: size)
    report = Report(None, 60)
    rig_module.each_size(parse(["--out", str(tmp_path), "--device", "cpu", "--sizes", "7b,13b"]), report, measure)
    assert done == ["13b"] and report.skipped == {"7b": "RuntimeError: CUDA out of memory"}


@pytest.mark.parametrize(("sm", "listed"), [("sm_90", False), ("sm_89", True)])
def test_the_doctor_says_whether_tensorrt_rtx_knows_the_gpu(sm: str, listed: bool) -> None:
    rtx = {"version": "1.7", "listed": ["SM80", "SM89"], "loads": {"SM80": "doesn't load: another GPU", "SM89": "loads"}}
    results: dict[str, Any] = {"torch": {"version": "2", "sm": sm}, "tensorrt_rtx": rtx, "executors": []}
    doctor._say_whether_listed(results)
    stage = {"device": "cuda", "status": "ok", "seconds": 1, "error": None, "skipped": {}, "wrong": {}, "results": results}
    said = describe_check({"machine": machine_facts(), "stages": {"doctor": stage}})
    assert f"{sm} {'is listed' if listed else 'is not listed'}; plans that load here: SM89" in said


@pytest.mark.tensorrt
def test_a_plan_for_every_listed_gpu_is_built_and_tried() -> None:
    pytest.importorskip("tensorrt_rtx")
    facts = doctor._tensorrt_rtx()
    assert {"SM80", "SM89"} <= set(facts["listed"]) == set(facts["loads"])
    assert {what.partition(":")[0] for what in facts["loads"].values()} <= {"loads", "doesn't load"}


def test_without_a_gpu_the_stages_say_so(tmp_path: Path) -> None:
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    report = worker.run_stage("curve", parse(["--out", str(tmp_path), "--sizes", "7b"]))
    assert report.status == "partial" and "sees no GPU (--device cpu tries the tool itself)" in report.skipped["7b"]


def test_no_work_starts_that_cannot_end_in_time() -> None:
    now = 0.0
    report = Report(None, 100, lambda: now)
    report.check_time(90)
    now = 20.0
    with pytest.raises(OutOfTimeError, match="80 s are left, 90 s are needed"):
        report.check_time(90)


def test_a_worker_gets_the_options_of_the_call(tmp_path: Path) -> None:
    options = options_for(tmp_path, "--bundle", "b", "--expected", "e", "--no-compile", "--limit", "60")
    passed = parse(command_line(options, "curve"))
    assert passed == dataclasses.replace(options, worker="curve")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stages", "curves"],
        ["--sizes", "7"],
        ["--sizes", ""],
        ["--rows", "0"],
        ["--rows", "65"],
        ["--rows", "x"],
        ["--limit", "481"],
    ],
    ids=" ".join,
)
def test_arguments_that_mean_nothing_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--out", str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


_BARE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "medusa_deploy", "sitecustomize"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib, json
from medusa_deploy.tools.gpu_check import runner, worker
from medusa_deploy.tools.gpu_check.options import STAGES, parse
options = parse(sys.argv[1:])
print(json.dumps({name: worker.run_stage(name, options).to_json() for name in STAGES}))
"""


def test_nothing_but_numpy_is_needed_to_say_what_is_missing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", _BARE, "--out", str(tmp_path), *BASIC]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    stages = json.loads(run.stdout)
    missing = "ModuleNotFoundError: No module named 'torch'"
    assert stages["doctor"]["status"] == "partial"
    assert stages["doctor"]["results"]["imports"]["torch"] == missing
    assert stages["exact"]["skipped"]["torch"] == missing
    for name in ("memory", "curve", "sizes", "overhead", "breakdown"):
        assert (stages[name]["status"], stages[name]["error"]["message"]) == ("failed", missing)
    assert stages["cuda-7b"]["status"] == "failed" and "No module named" in stages["cuda-7b"]["error"]["message"]
