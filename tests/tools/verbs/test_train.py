"""The verb ``train``: prompts in, a heads folder out; stages are kept and taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.export.heads.layouts import check_fit, read_heads
from medusa_deploy.runtime.errors import BundleExistsError, TrainingError
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.training.answering import AnswerPlan, open_backbone
from medusa_deploy.tools.training.heads import train


def write_prompts(path: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = [json.dumps({"token_ids": rng.integers(3, 128, 6).tolist()}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("train")
    prompts = [str(write_prompts(folder / f"{part}.jsonl", count, seed)) for part, count, seed in (("a", 8, 0), ("b", 4, 1))]
    sizes = ["--slots", "4", "--max-new-tokens", "16", "--epochs", "2", "--batch-size", "16", "--draft-vocab-size", "48"]
    files = ["--prompts", prompts[0], "--heldout", prompts[1], "--work", str(folder / "work")]
    return ["train", str(tiny_model), *files, *sizes, "-o", str(folder / "heads")]


@pytest.fixture(scope="module")
def report(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    output = tmp_path_factory.mktemp("report") / "train.json"
    assert main([*arguments, "--json", str(output)]) == 0
    result: dict[str, object] = json.loads(output.read_text("utf-8"))
    return result


def test_the_heads_fit_the_backbone_and_carry_their_tree(arguments: list[str], report: dict[str, object]) -> None:
    read = read_heads(Path(arguments[-1]))
    check_fit(read.heads, hidden_size=64, vocab_size=128)
    assert read.heads.config.kind == "grounded"
    assert read.heads.config.draft_vocab_size <= 48
    assert read.tree == report["tree"]
    assert len(read.tree or []) == 4


def test_the_report_says_how_they_were_made(arguments: list[str], report: dict[str, object]) -> None:
    config = json.loads((Path(arguments[-1]) / "config.json").read_text("utf-8"))
    for key in ("training", "data", "hit_rates", "tokens"):
        assert config[key] == report[key]
    assert 8 <= report["tokens"]["train"] <= 8 * 16  # type: ignore[index]
    assert len(config["hit_rates"]["heldout"]) == 4


def test_a_second_run_answers_nothing_again(
    arguments: list[str], report: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medusa_deploy.runtime.session import Session

    asked: list[object] = []
    original = Session.generate_many
    monkeypatch.setattr(Session, "generate_many", lambda self, requests: original(self, asked.extend(requests) or []))
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert asked == []
    assert "held-out top-5" in capsys.readouterr().out


def test_autocast_answers_in_bfloat16_and_holds_out_in_fp32(arguments: list[str], tmp_path: Path) -> None:
    given = list(arguments)
    for option, folder in (("--work", "work"), ("-o", "heads")):
        given[given.index(option) + 1] = str(tmp_path / folder)
    assert main([*given, "--autocast"]) == 0
    data = json.loads((tmp_path / "heads" / "config.json").read_text("utf-8"))["data"]
    assert data["train"]["weights_sha256"].endswith(" bfloat16")
    assert "bfloat16" not in data["heldout"]["weights_sha256"]


def test_a_work_folder_of_another_model_is_refused(arguments: list[str], report: dict[str, object], tmp_path: Path) -> None:
    work = Path(arguments[arguments.index("--work") + 1])
    with pytest.raises(TrainingError, match="belongs to a run"):
        train(AnswerPlan(tmp_path / "other", work), tmp_path / "heads", {})
    assert not (tmp_path / "heads").exists()


def test_an_existing_output_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    with pytest.raises(BundleExistsError):
        train(AnswerPlan(tiny_model, tmp_path / "work"), tmp_path / "heads", {})
    assert not (tmp_path / "work").exists()


def test_the_second_stage_makes_heads_that_are_exported_with_their_adapter(
    arguments: list[str],
    report: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from medusa_deploy.runtime import load

    stage_1, output = arguments[-1], tmp_path / "tuned"
    files = [arguments[index] for flag in ("--prompts", "--heldout", "--work") for index in range(len(arguments))
             if arguments[index] == flag or arguments[index - 1] == flag]  # fmt: skip
    common = ["train", arguments[1], *files, "--slots", "4", "--max-new-tokens", "16", "--stage", "2", "-o", str(output)]
    assert main(common) == 1
    assert "--heads" in capsys.readouterr().err
    sizes = ["--rank", "2", "--batch-tokens", "64"]
    with monkeypatch.context() as patch:
        patch.setattr("medusa_deploy.calibration.training.interpolate.share_within", lambda budget, rise: 0.0)
        assert main([*common, "--heads", stage_1, *sizes]) == 1
    assert "hardly any of what was learnt stays within" in capsys.readouterr().err
    assert not output.exists()
    sizes += ["--quality-budget", "9"]
    assert main([*common, "--heads", stage_1, *sizes, "--json", str(tmp_path / "report.json")]) == 0
    made = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert made["stage"] == 2
    assert set(made["quality"]["tuned"]) == {"the backbone's own answers"}  # no tokenizer, so no prose
    assert len(made["hit_rates"]["heldout"]) == 4
    assert len(made["answers"]) == 4
    assert made["kept"] == {"share": 1.0, "quality_budget": 9.0}
    assert set(made["before"]) == {"hit_rates", "expected_acceptance_length"}
    assert "perplexity" in capsys.readouterr().out
    assert main(["export", arguments[1], "--heads", str(output), "-o", str(tmp_path / "bundle"), "--capacity", "64"]) == 0
    assert "adapter (rank 2) is merged" in capsys.readouterr().out
    bundle = load(tmp_path / "bundle")
    assert bundle.manifest.provenance["adapter"]["rank"] == 2
    assert bundle.generate(token_ids=[5, 6, 7], max_new_tokens=8).token_ids
    assert main([*common, "--heads", str(output), "--force"]) == 1
    assert "already has an adapter" in capsys.readouterr().err
    assert main(["export", arguments[1], "--heads", str(output), "-o", str(tmp_path / "linked"), "--weights", "linked"]) == 1
    assert "adapter" in capsys.readouterr().err


def test_the_first_stage_goes_on_from_heads_and_samples_answers(
    arguments: list[str], report: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    more_options = ["--heads", arguments[-1], "--temperatures", "0,0.7", "--seed", "1", "--work", str(work)]
    # Its form is that of the heads: only what is asked for, and differs, is refused.
    options = [*_without(arguments[:-1], "--draft-vocab-size"), str(tmp_path / "more"), *more_options]
    assert main([*options, "--epochs", "1"]) == 0
    described = {part: json.loads((work / part / "data.json").read_text("utf-8")) for part in ("train", "heldout")}
    assert (described["train"]["temperatures"], described["heldout"]["temperatures"]) == ([0.0, 0.7], [0.0])
    assert (described["train"]["seed"], described["heldout"]["seed"]) == (1, 0)
    first, more = read_heads(Path(arguments[-1])).heads, read_heads(tmp_path / "more").heads
    assert more.token_map is not None
    assert np.array_equal(more.token_map, first.token_map)
    capsys.readouterr()
    assert main([*options, "--force", "--kind", "medusa"]) == 1
    assert "kind 'grounded', not 'medusa'" in capsys.readouterr().err


def test_held_out_answers_are_the_same_whatever_training_is_sampled_with(
    arguments: list[str], report: dict[str, object], tmp_path: Path
) -> None:
    """The seed went to the held-out answers, too, so that sampled data could not be used with another seed."""
    options = [*arguments[:-1], str(tmp_path / "heads"), "--work", str(tmp_path / "work"), "--epochs", "1"]
    assert main([*options, "--temperatures", "0.7", "--seed", "1"]) == 0
    first = sorted((tmp_path / "work" / "heldout").glob("*.npz"))
    held = [path.stat().st_mtime_ns for path in first]
    shutil.rmtree(tmp_path / "work" / "train")
    assert main([*options, "--temperatures", "0.7", "--seed", "2", "--force", "--num-layers", "2"]) == 0
    assert [path.stat().st_mtime_ns for path in first] == held


@pytest.mark.parametrize(
    ("stage", "option"),
    [("1", ["--rank", "4"]), ("1", ["--time-limit", "3"]), ("2", ["--kind", "medusa"]), ("2", ["--batch-size", "9"])],
)
def test_an_option_of_the_other_stage_is_refused(
    arguments: list[str], tmp_path: Path, stage: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", arguments[1], "-o", str(tmp_path / "heads"), "--stage", stage, "--heads", str(tmp_path)]
    assert main([*start, *option]) == 1
    assert f"{option[0]} belongs to the other stage" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_temperatures_are_numbers_from_zero(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("-1", "warm", "0,,1", "nan"):
        assert main([*arguments, "--temperatures", wrong]) == 2
        assert "is not a number from 0" in capsys.readouterr().err


def _without(arguments: list[str], option: str) -> list[str]:
    at = arguments.index(option)
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize(
    ("device", "autocast"), [("cpu", False), ("cpu:0", False), ("cpu", True)], ids=["runtime", "torch", "both"]
)
def test_what_a_tokenizer_or_model_lacks_is_said(
    device: str, autocast: bool, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = AnswerPlan(tiny_model, tmp_path, slots=2, device=device, autocast=autocast)
    for _ in range(2):  # the second run finds a bundle
        open_backbone(plan)
        assert capsys.readouterr().err.count("warning: the model has no tokenizer") == 1


def test_it_says_what_it_will_take(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_deploy.calibration.training.train import TrainConfig
    from medusa_deploy.tools.training import estimate

    now = [100.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: now[0])
    config = TrainConfig(epochs=2, batch_size=10)
    told = estimate.TimeEstimate(config, 0.5, heldout=4, together=2)
    assert told.training(100) == 2 * 10 * 0.5
    assert told.first_words(0, 8, 0) == ""
    now[0] += 3
    assert told.first_words(1, 8, 20) == "", "answers that are made together end together"
    words = told.first_words(2, 8, 40)  # 1.5 s an answer: 8 and 4 of them; 160 tokens are 2 x 16 steps
    assert words == "estimate: 34.0 s in all: answers 18.0 s, training 16.0 s"
    assert told.first_words(3, 8, 60) == "", "once"
    resumed = estimate.TimeEstimate(config, 0.5, heldout=4, together=2)
    assert resumed.first_words(4, 8, 80) == "", "an earlier run's answers took no time of this one"
    now[0] += 3
    assert resumed.first_words(6, 8, 120) == "estimate: 28.0 s in all: answers 12.0 s, training 16.0 s"
    finished = estimate.TimeEstimate(config, 0.5, heldout=4, together=2)
    assert finished.first_words(8, 8, 160) == "", "an earlier run answered everything"
    assert told.note(4, 8, 80) == "80 tokens, then training 16.0 s"
    assert estimate.time_steps(TrainConfig(batch_size=8, draft_vocab_size=32, num_heads=2), 16, "cpu") > 0
