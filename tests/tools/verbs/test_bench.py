"""bench: complete reports, fair order, equal output, honest arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime.errors import OutputError, UsageError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.session import Session
from medusa_deploy.runtime.tree import ROOT_ONLY, chain
from medusa_deploy.tools import cli
from medusa_deploy.tools.console import write_json
from medusa_deploy.tools.environment import plain_step_bytes
from medusa_deploy.tools.measure import bench as module
from medusa_deploy.tools.measure.bench import bench
from medusa_deploy.tools.measure.bench_report import describe, summarise
from medusa_deploy.tools.measure.row_sweep import describe_sweep, row_sweep, suggest
from medusa_deploy.tools.measure.timed_run import TimedRun, Way, timed_run
from medusa_deploy.tools.prompt_source import random_prompts
from medusa_deploy.tools.verbs import bench as verb
from support.tiny import HIDDEN, VOCAB

PROMPTS = random_prompts(128, 256, 2, seed=5)
KEYS = [
    "environment.cpu",
    "environment.cores",
    "environment.python",
    "environment.onnxruntime",
    "environment.medusa_deploy",
    "environment.date",
    "environment.bundle.manifest_sha256",
    "environment.bundle.dtype",
    "environment.bundle.stage",
    "environment.bundle.variant",
    "plain.tokens_per_s",
    "plain.ms_per_step",
    "medusa.tokens_per_s",
    "medusa.ms_per_step",
    "medusa.rows",
    "medusa.mean_acceptance_length",
    "medusa.accepted_histogram",
    "medusa.rows_histogram",
    "medusa.trust",
    "medusa.costs",
    "speedup",
    "median_speedup",
    "heads_only.speedup",
    "overhead",
    "host_fraction",
    "bandwidth_gb_s",
    "equal.prompts",
]


def value(report: Any, path: str) -> Any:
    for key in path.split("."):
        report = report[key]
    return report


def timed(tokens: int, steps: list[float], accepted: dict[int, int], first_token: int = 7) -> TimedRun:
    emitted = [first_token, *range(tokens)]
    return TimedRun(emitted, prefill_seconds=0.5, step_seconds=steps, engine_seconds=0.9 * sum(steps), accepted=accepted)


def test_a_timed_run_accounts_for_every_token_and_step(tiny_session: Session):
    run = timed_run(tiny_session, PROMPTS[0], Way(chain(3)), 20)
    expected = tiny_session.generate(token_ids=PROMPTS[0], tree=chain(3), lookup=False, max_new_tokens=20)
    assert run.tokens == expected.token_ids
    assert len(run.step_seconds) == expected.stats.steps == sum(run.accepted.values())
    assert 0 < run.engine_seconds < run.decode_seconds
    assert run.prefill_seconds > 0
    assert tiny_session.slots.free == 1


def test_the_verb_writes_every_key(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "reports" / "bench.json"
    options = ["--count", "2", "--max-new-tokens", "8", "--repeats", "1", "--sweep", "--json", str(output)]
    assert cli.main(["bench", str(tiny_bundle), *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "tokens/s with Medusa" in shown[0], "the headline comes first"
    report = json.loads(output.read_text())
    for path in KEYS:
        assert value(report, path) not in (None, "", []), path
    assert report["equal"] == {"prompts": 2, "of": 2, "different": []}
    assert report["sweep"]["ms_by_rows"].keys() == {str(rows) for rows in range(1, 17)}
    assert [path.name for path in output.parent.iterdir()] == ["bench.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "bench.json"
    write_json({"speedup": 1.0}, path)
    with pytest.raises(OutputError):
        write_json({"speedup": 2.0}, path / "below a file")
    with pytest.raises(TypeError):
        write_json({"speedup": object()}, path)
    assert json.loads(path.read_text()) == {"speedup": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]


def test_the_ways_take_turns_in_going_first(tiny_session: Session, monkeypatch: pytest.MonkeyPatch):
    order: list[tuple[int, str]] = []

    def spy(_session: Any, prompt: list[int], way: Way, _tokens: int) -> TimedRun:
        order.append((prompt[0], "plain" if way.tree is ROOT_ONLY else "medusa" if way.lookup else "heads"))
        return timed(4, [0.1, 0.1], {1: 2})

    monkeypatch.setattr(module, "timed_run", spy)
    bench(tiny_session, [[1], [2]], max_new_tokens=8, repeats=2, warmup=0)
    plain, medusa, heads = "plain", "medusa", "heads"
    turns = [(1, plain), (1, medusa), (1, heads), (2, medusa), (2, heads), (2, plain)]
    turns += [(1, medusa), (1, heads), (1, plain), (2, heads), (2, plain), (2, medusa)]
    assert order == turns


def three(plain: list[list[TimedRun]], medusa: list[list[TimedRun]]) -> dict[str, list[list[TimedRun]]]:
    return {"plain": plain, "medusa": medusa, "heads_only": plain}


def test_the_arithmetic():
    plain = [[timed(4, [0.1] * 4, {0: 4}), timed(4, [0.2] * 4, {0: 4}), timed(4, [0.1] * 4, {0: 4})]]
    medusa = [[timed(4, [0.12] * 2, {1: 2}), timed(4, [0.12, 0.12], {0: 1, 2: 1}), timed(4, [0.3] * 2, {1: 2})]]
    report = summarise(three(plain, medusa))
    assert report["plain"]["tokens_per_s"] == pytest.approx(10)
    assert report["medusa"]["tokens_per_s"] == pytest.approx(4 / 0.24)
    assert report["speedup"] == pytest.approx(4 / 0.24 / 10)
    assert report["plain"]["ms_per_step"] == pytest.approx(100)
    assert report["overhead"] == pytest.approx(1.2)
    assert report["heads_only"]["speedup"] == report["heads_only"]["overhead"] == 1
    assert report["medusa"]["accepted_histogram"] == [1, 4, 1]
    assert report["medusa"]["mean_acceptance_length"] == pytest.approx(2)
    assert report["host_fraction"] == pytest.approx(0.1)
    assert report["plain"]["tokens_per_s_with_prefill"] == pytest.approx(5 / (0.4 + 0.5))
    assert report["equal"]["prompts"] == 1


def test_the_speed_up_is_of_all_prompts_together_and_the_median_of_each():
    plain = [[timed(4, [0.1] * 4, {0: 4})], [timed(4, [0.1] * 4, {0: 4})], [timed(40, [0.1] * 40, {0: 40})]]
    medusa = [[timed(4, [0.1] * 4, {0: 4})], [timed(4, [0.1] * 2, {1: 2})], [timed(40, [0.1] * 10, {3: 10})]]
    report = summarise(three(plain, medusa))
    assert report["speedup"] == pytest.approx(48 / 16)
    assert report["median_speedup"] == pytest.approx(2)


def test_different_output_is_shown():
    plain = [[timed(4, [0.1], {0: 4})], [timed(4, [0.1], {0: 4})]]
    medusa = [[timed(4, [0.1], {1: 2})], [timed(4, [0.1], {1: 2}, first_token=8)]]
    report = summarise(three(plain, medusa)) | {"bandwidth_gb_s": 1.0}
    assert report["equal"] == {"prompts": 1, "of": 2, "different": [1]}
    assert "DIFFERENT output for prompt 2" in describe(report)


def test_prompts_that_end_at_once_are_left_out():
    ended, went_on = timed(0, [], {}), timed(4, [0.1] * 4, {0: 4})
    report = summarise(three([[ended], [went_on]], [[ended], [went_on]]))
    assert [prompt["prompt"] for prompt in report["per_prompt"]] == [1]
    with pytest.raises(UsageError, match="first token"):
        summarise(three([[ended]], [[ended]]))


@pytest.mark.parametrize("options", [{"prompts": []}, {"repeats": 0}, {"max_new_tokens": 1}])
def test_nothing_to_measure_is_refused(tiny_session: Session, options: dict[str, Any]):
    with pytest.raises(UsageError):
        bench(tiny_session, options.pop("prompts", PROMPTS), **options)


def test_a_tree_from_a_file_is_used(tiny_session: Session, tmp_path: Path):
    path = tmp_path / "pair.json"
    path.write_text("[[0], [1]]")
    tree, note = verb._tree(tiny_session.manifest, str(path), 0)
    assert tree is not None
    assert (tree.choices(), note) == ([[0], [1]], "")
    report = bench(tiny_session, PROMPTS[:1], tree=tree, max_new_tokens=6, repeats=1)
    assert report["fixed_tree"]["rows"] == 3
    assert set(report["fixed_tree"]["rows_histogram"]) <= {0, report["fixed_tree"]["rows_histogram"][-1]}
    assert report["fixed_tree"]["choices"] == [[0], [1]]
    assert len(report["fixed_tree"]["accepted_histogram"]) <= 2
    assert 1 <= report["medusa"]["rows"] <= 16


def test_fixed_numbers_of_rows_stand_beside_the_chosen_ones(tiny_session: Session):
    report = bench(tiny_session, PROMPTS[:1], fixed_rows=(2, 4), max_new_tokens=6, repeats=1)
    assert (report["rows_2"]["rows"], report["rows_4"]["rows"]) == (2, 4)
    assert "costs" in report["medusa"] and "costs" not in report["rows_4"]
    shown = describe({**report, "bandwidth_gb_s": 1.0})
    assert "4 rows in every step" in shown
    assert "cost of a step against a plain one: 1 1.00" in shown


def test_sampled_text_is_the_same_in_every_way_but_the_lossy_one(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--count", "2", "--max-new-tokens", "24", "--repeats", "1", "--temperature", "0.7", "--seed", "3", "--json", "-"]
    assert cli.main(["bench", str(tiny_bundle), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["temperature"], report["seed"]) == (0.7, 3)
    assert report["equal"] == {"prompts": 2, "of": 2, "different": []}
    assert report["typical"]["speedup"] > 0
    assert report["typical"]["mean_acceptance_length"] >= 1
    shown = describe(report)
    assert "sampled at temperature 0.7" in shown.splitlines()[0]
    assert "typical acceptance, lossy" in shown


def test_sampled_runs_are_sampled(tiny_session: Session):
    ways = module._sampled({"plain": Way(ROOT_ONLY)}, 1.0, 5)
    sampled = timed_run(tiny_session, PROMPTS[0], ways["plain"], 20).tokens
    assert sampled == timed_run(tiny_session, PROMPTS[0], ways["plain"], 20).tokens
    assert sampled != timed_run(tiny_session, PROMPTS[0], Way(ROOT_ONLY), 20).tokens


def test_lossy_text_may_differ():
    runs = {**three([[timed(4, [0.1] * 4, {0: 4})]], [[timed(4, [0.1] * 2, {1: 2})]]), "typical": [[timed(5, [0.1] * 2, {1: 2})]]}
    assert summarise(runs)["equal"] == {"prompts": 1, "of": 1, "different": []}


@pytest.mark.parametrize("temperature", ["-0.5", "nan", "inf", "warm"])
def test_a_temperature_is_a_number_from_zero(tiny_bundle: Path, temperature: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", str(tiny_bundle), "--temperature", temperature]) == 2
    assert "is not a number from 0" in capsys.readouterr().err


def test_the_sweep_measures_every_size(tiny_session: Session):
    report = row_sweep(tiny_session, rounds=2)
    assert list(report["ms_by_rows"]) == list(range(1, 17))
    assert min(report["ms_by_rows"].values()) > 0
    assert "no path rates" in describe_sweep(report)
    assert tiny_session.slots.free == 1


def test_the_sweep_suggests_the_size_that_pays():
    suggestions = suggest({(0,): 0.5, (1,): 0.2, (0, 0): 0.2}, {1: 10.0, 2: 10.0, 3: 10.0, 4: 20.0})
    assert [entry["tokens_per_step"] for entry in suggestions] == pytest.approx([1, 1.5, 1.7, 1.9])
    assert [entry["speedup"] for entry in suggestions] == pytest.approx([1, 1.5, 1.7, 0.95])
    shown = describe_sweep({"ms_by_rows": {1: 10.0, 2: 10.0, 3: 10.0, 4: 20.0}, "suggestions": suggestions})
    assert "best size: 3 rows, 1.70×" in shown
    assert "by rates alone" in shown


def test_bytes_of_a_plain_step_are_those_that_its_graph_reads(tiny_bundle: Path):
    manifest = open_bundle(tiny_bundle).manifest
    layer = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * 128  # keys and values together are as wide as queries
    assert plain_step_bytes(manifest, "cpu") == 4 * (2 * layer + VOCAB * HIDDEN), "neither heads nor what is read by the row"
    assert plain_step_bytes(manifest, "standard") is None
    facts = replace(manifest, provenance={"quantised": {"cpu-int8": {"plain_step_bytes": 5}}})
    assert plain_step_bytes(facts, "cpu-int8") == 5 and plain_step_bytes(facts, "cpu") is None
