"""figure: what the bars and the parts of a step say, which reports it refuses, and that pictures are written whole."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime.errors import BundleExistsError, MissingDependencyError, OutputError, UsageError
from medusa_deploy.tools import extras
from medusa_deploy.tools.cli import OK, USER_ERROR, main
from medusa_deploy.tools.figure.data import figure_data
from medusa_deploy.tools.figure.draw import describe, draw
from medusa_deploy.tools.figure.sizes import draw_sizes
from medusa_deploy.tools.verbs.figure import draw_figure

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2-grounded.json"
COMMITTED = ROOT / "docs" / "speedup.svg"
ONE, TWO = Path("one.json"), Path("two.json")


def side(rate: float, ms: float, host: float, **more: Any) -> dict[str, Any]:
    return {"tokens_per_s": rate, "ms_per_step": ms, "host_fraction": host, "steps": 5, **more}


def report(**changes: Any) -> dict[str, Any]:
    """A report of bench in round numbers: plain 40 tokens/s, heads 60, with lookup 80."""
    whole: dict[str, Any] = {
        "environment": {"cpu": "CPU A", "cores": 2, "bundle": {"dtype": "float32"}},
        "prompts": 3,
        "max_new_tokens": 9,
        "plain": side(40.0, 20.0, 0.1),
        "medusa": side(80.0, 30.0, 0.2, speedup=2.0, mean_acceptance_length=3.0),
        "heads_only": side(60.0, 25.0, 0.2, speedup=1.5, mean_acceptance_length=1.9),
        "equal": {"different": [], "of": 3},
    }
    return {**whole, **changes}


def on(cpu: str) -> dict[str, Any]:
    return {"cpu": cpu, "cores": 2, "bundle": {"dtype": "float32"}}


def texts(svg: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_bars_are_the_reports_rates_and_speedups() -> None:
    [group] = figure_data({ONE: report()}).groups
    assert [(bar.label, bar.tokens_per_s, bar.speedup) for bar in group.bars] == [
        ("without Medusa", 40.0, 1.0),
        ("Medusa-1", 60.0, 1.5),
        ("Medusa-1 + prompt lookup", 80.0, 2.0),
    ]


def test_the_parts_of_a_step_add_up_to_it() -> None:
    [group] = figure_data({ONE: report()}).groups
    plain, medusa = group.steps
    assert (plain.backbone, plain.added, plain.host) == pytest.approx((18.0, 0.0, 2.0))
    assert (medusa.backbone, medusa.added, medusa.host, medusa.tokens) == pytest.approx((18.0, 6.0, 6.0, 3.0))
    assert (plain.total, medusa.total) == pytest.approx((20.0, 30.0))


def test_a_step_that_noise_made_shorter_than_plain_has_no_negative_part() -> None:
    [group] = figure_data({ONE: report(medusa=side(80.0, 15.0, 0.2, speedup=2.0, mean_acceptance_length=3.0))}).groups
    assert (group.steps[1].backbone, group.steps[1].added, group.steps[1].total) == pytest.approx((12.0, 0.0, 15.0))


def test_both_stages_of_a_model_share_a_group_and_keep_their_own_plain_rate() -> None:
    second = report(plain=side(38.0, 20.0, 0.1))
    second["environment"]["bundle"]["stage"] = 2
    data = figure_data({TWO: second, ONE: report()}, labels={ONE: "model", TWO: "model"})
    [group] = data.groups
    assert [bar.stage for bar in group.bars] == [0, 1, 1, 2, 2]
    assert [bar.plain_tokens_per_s for bar in group.bars] == [40.0, 40.0, 40.0, 38.0, 38.0]
    assert "Dotted: plain decoding in that bar's own run." in texts(draw(data, "svg").decode())
    assert figure_data({TWO: report()}, stages={TWO: 2}).groups[0].bars[1].stage == 2


def test_a_fixed_tree_is_not_called_prompt_lookup() -> None:
    ahead = report(best_rows=side(70.0, 30.0, 0.2, speedup=1.75, mean_acceptance_length=2.5))
    [group] = figure_data({ONE: ahead}).groups
    assert [(bar.lookup, bar.tokens_per_s) for bar in group.bars] == [(False, 40.0), (False, 80.0), (True, 70.0)]
    assert group.steps[1].tokens == 2.5


def test_machines_are_told_apart_when_they_differ() -> None:
    assert "CPU A, 2 cores" in figure_data({ONE: report(), TWO: report()}).shared
    data = figure_data({ONE: report(), TWO: report(environment=on("CPU B"))}, labels={ONE: "model", TWO: "model"})
    assert data.shared == ""
    assert [group.name for group in data.groups] == ["model (1)", "model (2)"]
    shown = texts(draw(data, "svg").decode())
    assert [text for text in shown if "CPU A" in text]
    assert [text for text in shown if "CPU B" in text]


def eight_bits() -> dict[str, Any]:
    """A report of the 8-bit variant on the machine of :func:`report`."""
    eight = copy.deepcopy(report(plain=side(80.0, 10.0, 0.1)))
    eight["environment"]["bundle"]["variant"] = "cpu-int8"
    return eight


def test_precisions_of_a_model_are_told_apart_and_share_their_settings() -> None:
    data = figure_data({ONE: report(), TWO: eight_bits()}, labels={ONE: "model", TWO: "model"})
    assert [(group.name, group.precision) for group in data.groups] == [("model, fp32", "fp32"), ("model, 8 bits", "8 bits")]
    assert data.shared.startswith("CPU A, 2 cores")


def test_the_cost_of_a_step_is_its_tokens_over_its_speedup() -> None:
    [group] = figure_data({ONE: report()}).groups
    assert [(bar.tokens, bar.cost) for bar in group.bars] == [(1.0, 1.0), (1.9, pytest.approx(1.9 / 1.5)), (3.0, 1.5)]


def test_several_models_are_drawn_as_sizes(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in ("small", "small-int8", "large")]
    for file, found in zip(files, (report(), eight_bits(), report(plain=side(4.0, 200.0, 0.1))), strict=True):
        file.write_text(json.dumps(found), "utf-8")
    labels = dict(zip(files, ("small", "small", "large"), strict=True))
    data = draw_figure(files, tmp_path / "figure.svg", labels=labels)
    shown = texts((tmp_path / "figure.svg").read_text("utf-8"))
    assert [group.model for group in data.groups] == ["small", "small", "large"]
    assert {"small", "large", "fp32", "8 bits", "Tokens a step", "Cost of a step, plain steps"} <= set(shown)


def test_titles_stand_at_one_height_above_legends_of_different_lengths() -> None:
    second = report()
    second["environment"]["bundle"]["stage"] = 2
    for reports in ({ONE: report()}, {ONE: report(), TWO: second}):
        svg = draw(figure_data(reports, labels=dict.fromkeys(reports, "model")), "svg").decode()
        heights = [
            re.search(rf'<text[^>]*(?:translate\([-\d.]+ |y=")([-\d.]+)[^>]*>{title}<', svg)
            for title in ("How fast", "Where the time goes")
        ]
        assert all(heights)
        assert len({float(found[1]) for found in heights if found}) == 1


def test_outputs_that_differ_are_said_in_the_picture() -> None:
    data = figure_data({ONE: report(equal={"different": [1], "of": 3})})
    assert "one, Medusa-1: 1 of 3 outputs differ between the ways" in texts(draw(data, "svg").decode())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "no environment.cpu"),
        ([], "no environment.cpu"),
        (report(medusa={}), "no medusa.tokens_per_s"),
        (report(heads_only=None), "no heads_only.tokens_per_s"),
        (report(prompts=None), "no prompts"),
        (report(environment={"cpu": "A", "cores": 1, "bundle": {}}), "no environment.bundle.dtype"),
        (report(plain=side(40.0, 20.0, 0.1) | {"steps": 0}), "no decode steps"),
    ],
)
def test_what_is_no_report_of_bench_is_refused_by_name(broken: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"two\.json .*{message}"):
        figure_data({ONE: report(), TWO: broken})


def test_reports_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="second report of Medusa-1 for model"):
        figure_data({ONE: report(), TWO: report()}, labels={ONE: "model", TWO: "model"})
    with pytest.raises(UsageError, match="none of the reports"):
        figure_data({ONE: report()}, labels={TWO: "model"})
    with pytest.raises(UsageError, match="no report"):
        figure_data({})


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_pictures_are_the_same_bytes_every_time(suffix: str, start: bytes, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for picture in pictures:
        draw_figure([RESULTS], picture)
    first, second = (picture.read_bytes() for picture in pictures)
    assert first.startswith(start)
    assert first == second


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_written_whole_or_not_at_all(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / f"figure{suffix}"
    picture.write_text("old")
    with pytest.raises(BundleExistsError):
        draw_figure([RESULTS], picture)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            draw_figure([RESULTS], picture, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]
    assert picture.read_text() == "old"
    draw_figure([RESULTS], picture, force=True)
    assert picture.stat().st_size > 1000


def test_other_suffixes_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", str(RESULTS), "-o", str(tmp_path / "figure.pdf")]) == USER_ERROR
    assert "can't draw .pdf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_verb_prints_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, written = tmp_path / "figure.svg", tmp_path / "figure.json"
    options = ["--label", f"{RESULTS}=A <model> & more", "--stage", f"{RESULTS}=2", "--json", str(written)]
    assert main(["figure", str(RESULTS), "-o", str(output), *options]) == OK
    shown = capsys.readouterr().out
    assert "A <model> & more" in shown
    measured = json.loads(RESULTS.read_text("utf-8"))["medusa"]
    assert f"Medusa-2 + prompt lookup: {measured['tokens_per_s']:.1f} tokens/s, {measured['speedup']:.2f}×" in shown
    assert "A <model> & more" in texts(output.read_text("utf-8"))
    assert json.loads(written.read_text("utf-8"))["groups"][0]["bars"][1]["stage"] == 2


@pytest.mark.parametrize(
    "option", [["--label", "x"], ["--label", "=x"], ["--stage", f"{RESULTS}=3"], ["--stage", "other.json=2"]]
)
def test_options_that_fit_no_report_are_refused(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", str(RESULTS), "-o", str(tmp_path / "figure.svg"), *option]) == USER_ERROR
    assert "hint: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "version", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        draw_figure([RESULTS], tmp_path / "figure.svg")
    assert "medusa-deploy[figure]" in caught.value.hint


def test_help_does_not_import_matplotlib() -> None:
    code = "import sys; from medusa_deploy.tools.cli import main; main(['figure', '--help']); print('matplotlib' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_committed_figure_says_what_the_committed_results_say() -> None:
    committed = COMMITTED.read_text("utf-8")
    sizes = re.findall(r"^SIZES = (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[0].split()
    paths = [path for size in sizes for path in sorted(RESULTS.parent.glob(f"{size}-medusa-?-*.json"))]
    results = {path: json.loads(path.read_text("utf-8")) for path in paths}
    data = figure_data(results)
    [described] = re.findall(r'<desc id="desc">(.*?)</desc>', committed, re.DOTALL)
    assert unescape(described) == describe(data), "run make figure"
    rates = {f"{bar.tokens_per_s:.1f}" for group in data.groups for bar in group.bars}

    def without_ticks(svg: str) -> list[str]:
        """Ticks are matplotlib's choice and may change with its version; everything else is ours."""
        return [text for text in texts(svg) if text in rates or re.fullmatch(r"[0-9.]+", text) is None]

    ours = without_ticks(draw_sizes(data, "svg").decode())
    assert without_ticks(committed) == ours, "run make figure"
    for report in results.values():
        for way in ("medusa", "heads_only"):
            assert f"{report[way]['speedup']:.2f}×" in ours
            assert f"{report[way]['tokens_per_s']:.1f}" in ours
    other = copy.deepcopy(results)
    other[paths[0]]["medusa"]["speedup"] += 0.1
    assert describe(figure_data(other)) != describe(data)


def test_a_report_may_say_its_label() -> None:
    labelled = report(label="A model")
    assert figure_data({ONE: labelled}).groups[0].model == "A model"
    assert figure_data({ONE: labelled}, labels={ONE: "Another"}).groups[0].model == "Another"
    assert figure_data({ONE: report()}).groups[0].model == "one"
