"""The verb plan: what it prints, what it refuses, and that the commands it gives are commands."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime.errors import DeployError, UsageError
from medusa_deploy.tools.cli import OK, USAGE, USER_ERROR, VERBS, main
from medusa_deploy.tools.sizing.deployment import plan_deployment
from medusa_deploy.tools.sizing.gpus import GPUS, find_gpu
from medusa_deploy.tools.sizing.model_sizes import PRESETS
from support.documents import ROOT, blocks
from support.families import FAMILIES, make_family


def test_the_worked_example_of_the_document_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks(ROOT / "docs" / "planning.md", "console")
    words = shlex.split(example)
    assert words[:3] == ["$", "medusa-deploy", "plan"]
    assert main(words[2:]) == OK
    shown, *_ = blocks(ROOT / "docs" / "planning.md", "text")
    assert capsys.readouterr().out == shown


def test_without_a_gpu_there_are_bytes_and_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "smollm2-135m"]) == OK
    shown = capsys.readouterr().out
    assert "134,515,008 parameters" in shown
    assert "the embedding's memory: tied" in shown
    assert "fits" not in shown
    assert "ms" not in shown


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "7b", "--gpu", "4090", "--heads", "own", "--num-heads", "5", "--json", "-"]) == OK
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 6_738_415_616
    assert sum(report["bytes"]["parts"].values()) == 2 * 6_738_415_616
    assert report["heads"]["num_heads"] == 5
    assert report["fit"]["left"] == 24 * 10**9 - report["total"]
    assert report["fits"]
    assert [step["rows"] for step in report["steps"]] == [8, 16, 32, 64]
    assert report["steps"][0]["tokens_per_second"] is None, "no acceptance length was given, so none is assumed"


def test_the_list_names_every_size_and_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == OK
    shown = capsys.readouterr().out
    assert [entry.name for entry in (*PRESETS, *GPUS) if entry.name not in shown] == []


def test_what_does_not_fit_says_by_how_much_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--size", "13b", "--gpu", "4090"]) == USER_ERROR
    shown = capsys.readouterr().out
    assert re.search(r"does not fit: \d+\.\d+ GiB too much for RTX 4090", shown)
    assert "the weights alone are" in shown
    assert "try: --precision int8 fits" in shown
    assert "with 32 GB it fits: RTX 5090" in shown or "with 40 GB it fits: A100 40GB" in shown


@pytest.mark.parametrize(("size", "gpu", "batch"), [("7b", "4090", 8), ("13b", "4090", 4), ("8b", "4080", 2), ("13b", "3090", 1)])
def test_every_suggestion_makes_it_fit(size: str, gpu: str, batch: int) -> None:
    asked = {"size": size, "gpu": gpu, "batch": batch, "capacity": 4096}
    plan = plan_deployment(**asked)  # type: ignore[arg-type]
    assert not plan.fits
    options = [suggestion for suggestion in plan.suggestions if suggestion.startswith("--")]
    assert options
    for option in options:
        parser = argparse.ArgumentParser()
        for name, kind in (("--precision", str), ("--batch", int), ("--capacity", int)):
            parser.add_argument(name, type=kind)  # type: ignore[arg-type]
        changed = {name: value for name, value in vars(parser.parse_args(option.split()[:-1])).items() if value is not None}
        assert plan_deployment(**{**asked, **changed}).fits, option
    [larger] = [suggestion for suggestion in plan.suggestions if suggestion.startswith("with ")]
    for name in larger.partition(": ")[2].split(", "):
        assert plan_deployment(**{**asked, "gpu": name}).fits  # type: ignore[arg-type]


def test_the_largest_that_fits_fits_and_one_more_does_not() -> None:
    plan = plan_deployment(size="8b", gpu="4090", precision="int8")
    assert plan.fit is not None
    for capacity, batch in plan.fit.largest_batches:
        assert plan_deployment(size="8b", gpu="4090", precision="int8", capacity=capacity, batch=batch).fits
        assert not plan_deployment(size="8b", gpu="4090", precision="int8", capacity=capacity, batch=batch + 1).fits
    most = plan.fit.largest_capacity
    assert plan_deployment(size="8b", gpu="4090", precision="int8", capacity=most).fits
    assert not plan_deployment(size="8b", gpu="4090", precision="int8", capacity=most + 64).fits


def test_plain_decoding_is_bound_by_the_bytes_that_it_reads() -> None:
    plan = plan_deployment(size="7b", gpu="4090", context=0)
    embedding, token = 2 * 32000 * 4096, 2 * 32 * 4096 * 2
    assert plan.plain is not None
    assert plan.plain.nbytes == 2 * 6_738_415_616 - embedding + token
    assert plan.plain.bound == "bandwidth"
    assert plan.plain.tokens_per_second == pytest.approx(1008e9 / plan.plain.nbytes)


def test_many_rows_of_many_slots_are_bound_by_compute() -> None:
    plan = plan_deployment(size="7b", gpu="4090", batch=16, capacity=128, rows=[64])
    assert plan.steps[-1].bound == "compute"
    assert plan.steps[-1].seconds == pytest.approx(plan.steps[-1].flops / 165.2e12)
    weights = 6_738_415_616 - 32000 * 4096
    assert plan.steps[-1].flops > 2 * 16 * 64 * weights * 0.99


def test_own_heads_cost_more_than_shared_more_than_pruned() -> None:
    own, shared, pruned = plan_deployment(size="8b", gpu="4090", precision="int8").heads_estimates
    assert own.nbytes > pruned.nbytes > shared.nbytes
    assert own.nbytes_read > shared.nbytes_read > pruned.nbytes_read
    assert (own.ratio or 0) > (shared.ratio or 0) > (pruned.ratio or 0) > 1


def test_an_acceptance_length_that_was_measured_gives_a_rate() -> None:
    plan = plan_deployment(size="7b", gpu="4090", acceptance=2.5, batch=2, capacity=1024)
    for step in plan.steps:
        assert step.tokens_per_second == pytest.approx(2 * 2.5 / step.seconds)


def parses(command: str) -> None:
    """The command line is one that its verb takes."""
    words = shlex.split(command)
    assert words[0] == "medusa-deploy"
    verb = {verb.name: verb for verb in VERBS}[words[1]]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    importlib.import_module(f"medusa_deploy.tools.verbs.{verb.name}").add_arguments(parser)
    parser.parse_args(words[2:])


@pytest.mark.parametrize(("size", "precision"), [("smollm2-135m", "fp16"), ("1b", "int8"), ("13b", "int8"), ("13b", "fp16")])
@pytest.mark.parametrize("gpu", ["4090", "h100 sxm", None])
def test_the_commands_are_commands(size: str, precision: str, gpu: str | None) -> None:
    plan = plan_deployment(size=size, precision=precision, gpu=gpu)
    assert len(plan.commands) == (1 if gpu is None else 2)
    for command in plan.commands:
        parses(command)
    if gpu is not None:
        build = plan.commands[-1]
        assert ("--target sm_89" if gpu == "4090" else "--backend tensorrt --target here") in build
        assert f"--rows {','.join(map(str, plan.rows))}" in build


def test_int8_is_never_asked_of_a_build_that_refuses_it() -> None:
    """int8 weights are made from copied ones and lie inside the plan."""
    plan = plan_deployment(size="13b", precision="int8", gpu="4090")
    assert not any("linked" in command or "streamed" in command for command in plan.commands)
    assert any("in memory where it runs" in note for note in plan.notes)


def test_a_bundle_brings_its_heads_and_limits(tiny_bundle: Path) -> None:
    plan = plan_deployment(bundle=tiny_bundle, gpu="orin nx 8gb", rows=[8])
    assert (plan.heads.num_heads, plan.heads.projection) == (3, "shared")
    assert (plan.limits.capacity, plan.limits.batch, plan.limits.max_rows) == (256, 4, 16)
    assert plan.commands == (f"medusa-deploy build {tiny_bundle} --backend tensorrt --target here --rows 1,8",)
    assert plan_deployment(bundle=tiny_bundle, heads="own", num_heads=2).heads.projection == "own"


def test_a_models_folder_is_planned_without_its_weights(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tiny_model), "--capacity", "512"]) == OK
    assert "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mistral: windows", "gemma2: windows, soft caps of scores and of logits"])
def test_a_window_limits_no_capacity(name: str, tmp_path: Path) -> None:
    plan = plan_deployment(model=make_family(FAMILIES[name], tmp_path / "model"), capacity=200)
    assert plan.limits.capacity == 200
    with pytest.raises(UsageError, match="the model attends to 256"):
        plan_deployment(model=tmp_path / "model", capacity=257)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "prund:64"}, "unknown heads 'prund:64'"),
        ({"heads": "pruned"}, "unknown heads 'pruned'"),
        ({"heads": "own:64"}, "unknown heads 'own:64'"),
        ({"heads": "pruned:99999999"}, "over 99999999 tokens"),
        ({"precision": "fp6"}, "unknown precision 'fp6'"),
        ({"capacity": 8192}, "the model attends to 4096"),
        ({"context": 5000}, "a context of 5000 tokens"),
        ({"acceptance": 9.0}, "a mean acceptance length of 9.0"),
        ({"batch": 0}, "at least 1"),
        ({"rows": [0, 8]}, "at least 1"),
        ({"gpu": "rtx 9"}, "unknown GPU"),
        ({"bundle": "here"}, "2 of size, model and bundle"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan_deployment(**{"size": "13b", **options})
    assert caught.value.hint or "at least 1" in caught.value.message


def test_something_must_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == USAGE
    assert "--size" in capsys.readouterr().err


def test_a_gpu_without_a_rate_says_that_only_memory_bounds_it() -> None:
    assert find_gpu("4070").fp16 is None
    plan = plan_deployment(size="1b", gpu="4070", batch=64, capacity=64)
    assert {step.bound for step in plan.steps} == {"bandwidth"}
    assert any("bound by memory alone" in note for note in plan.notes)


def heads_folder(folder: Path, rates: list[Any]) -> Path:
    folder.mkdir()
    config = {"kind": "medusa", "num_heads": 2, "num_layers": 1, "hidden_size": 576, "draft_vocab_size": 64}
    (folder / "config.json").write_text(json.dumps({**config, "projection": "pruned", "path_rates": rates}))
    return folder


def sweep_file(path: Path, milliseconds: dict[str, float]) -> Path:
    path.write_text(json.dumps({"sweep": {"ms_by_rows": milliseconds}}))
    return path


def test_heads_and_step_times_give_the_speed_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = heads_folder(tmp_path / "heads", [[[0], 0.5], [[0, 0], 0.25], [[1], 0.125]])
    sweep = sweep_file(tmp_path / "sweep.json", {"1": 10, "2": 12, "3": 14, "4": 40})
    plan = plan_deployment(size="smollm2-135m", heads=str(heads), bench=sweep)
    assert plan.heads.num_heads == 2 and plan.heads.draft_vocab_size == 64
    assert [each.tokens_per_step for each in plan.expected] == [1, 1.5, 1.75, 1.875]
    assert [each.speedup for each in plan.expected] == pytest.approx([1, 1.25, 1.25, 0.46875])
    assert main(["plan", "--size", "smollm2-135m", "--heads", str(heads), "--bench", str(sweep)]) == OK
    assert "expect 1.25× from 2 rows" in capsys.readouterr().out
    slow = sweep_file(tmp_path / "slow.json", {"1": 10, "2": 30})
    assert main(["plan", "--size", "smollm2-135m", "--heads", str(heads), "--bench", str(slow)]) == OK
    assert "no number of rows pays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "rates", "times", "message"),
    [
        ("13b", [[[0], 0.5]], {"1": 10}, "hidden size 576, the backbone 5120"),
        ("smollm2-135m", [], {"1": 10}, "doesn't say how often paths were right"),
        ("smollm2-135m", [[[0], "x"]], {"1": 10}, "doesn't say how often paths were right"),
        ("smollm2-135m", [[[0], 0.5]], {"2": 10}, "no step times by rows"),
        ("smollm2-135m", [[[0], 0.5]], {"1": 0}, "no step times by rows"),
    ],
)
def test_heads_and_times_that_do_not_do_are_named(
    size: str, rates: list[Any], times: dict[str, float], message: str, tmp_path: Path
) -> None:
    heads, sweep = heads_folder(tmp_path / "heads", rates), sweep_file(tmp_path / "sweep.json", times)
    with pytest.raises(DeployError, match=message):
        plan_deployment(size=size, heads=str(heads), bench=sweep)


def test_step_times_without_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing of heads"):
        plan_deployment(size="smollm2-135m", heads="shared", bench=sweep_file(tmp_path / "sweep.json", {"1": 10}))
