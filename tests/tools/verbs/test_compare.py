"""compare: nothing is found where nothing differs; what differs is measured as transformers would measure it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


from medusa_deploy.runtime.errors import CapacityError, NumericsError, UsageError, VocabularyMismatchError
from medusa_deploy.runtime.files.bundle import record_files
from medusa_deploy.runtime.session import Session, load
from medusa_deploy.tools import cli
from medusa_deploy.tools.compare.budget import QualityBudget, judge
from medusa_deploy.tools.compare.comparison import compare
from medusa_deploy.tools.compare.hits import paired_hits
from medusa_deploy.tools.compare.page import page
from medusa_deploy.tools.compare.table import describe
from medusa_deploy.tools.measure import layer_errors as layers_module
from medusa_deploy.tools.measure.agreement import Agreement
from medusa_deploy.tools.measure.hit_table import count_hits
from medusa_deploy.tools.prompt_source import random_prompts
from support.documents import Reader
from support.text import text_bundle
from support.tiny import VOCAB

PROMPTS = random_prompts(VOCAB, 256, 3, seed=5)
TOKENS = 24
OPTIONS = ["--count", "2", "--max-new-tokens", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Path, other_bundle: Path) -> tuple[Session, Session]:
    return load(tiny_bundle, threads=1), load(other_bundle, threads=1)


@pytest.fixture(scope="module")
def report(sessions: tuple[Session, Session]) -> dict[str, Any]:
    """Of the noisy model against the tiny one, with what ``run`` adds."""
    side = {"name": "tiny", "variant": "cpu", "dtype": "float32"}
    found = compare(*sessions, PROMPTS, max_new_tokens=TOKENS, threads=1)
    return {"environment": {"date": "today", "a": side, "b": {**side, "name": "noisy"}}, **found}


def log_probabilities(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """As transformers computes them, float64 [n, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.no_grad():
        return module(torch.tensor([list(tokens)])).logits[0].log_softmax(-1).numpy()  # type: ignore[no-any-return]


def test_two_graphs_of_one_model_are_alike(tiny_bundle: Path):
    graphs = [load(tiny_bundle, variant=variant, threads=1) for variant in ("cpu", "standard")]
    found = compare(*graphs, PROMPTS, max_new_tokens=TOKENS, threads=1)
    assert found["verdict"]["passed"]
    answers, greedy = found["answers"], found["greedy"]
    assert answers["positions"] == sum(each["a"] for each in greedy["per_answer"])
    assert abs(answers["perplexity"]["increase_percent"]) < 1e-3
    assert answers["kl_nats"]["largest"] < 1e-8
    assert answers["argmax_agreement"] == {"share": 1.0, "disagreeing": 0}
    assert answers["margin_nats"]["disagreeing"] is None
    assert found["prose"] is None, "the bundle has no tokenizer"
    assert greedy["identical_share"] == 1 and set(greedy["same_after"]) == {1.0}
    assert found["heads"]["a"] == found["heads"]["b"]
    assert found["acceptance"]["ratio"] == 1 and found["acceptance"]["ratio_95"] == [1, 1]
    assert found["exactness"]["a"]["unexplained"] == found["exactness"]["b"]["unexplained"] == 0
    assert len(found["layers"]["median"]) == 2 and found["layers"]["not_comparable"] == []
    assert 0 < max(found["layers"]["relative_rms"]) < 1e-4, "rounded to the last bit alike: the same graph ran twice"


def test_reading_finds_what_transformers_finds(sessions: tuple[Session, Session], tiny_model: Path, other_model: Path):
    answer = sessions[0].generate(token_ids=PROMPTS[0], speculative=False, max_new_tokens=TOKENS).token_ids
    text, given = [*PROMPTS[0], *answer], len(PROMPTS[0])
    a, b = (log_probabilities(model, text)[given - 1 : -1] for model in (tiny_model, other_model))
    rows = np.arange(len(answer))
    agreement = Agreement(*sessions, 8)
    agreement.read(text, given)
    found = agreement.report()
    assert found["positions"] == len(answer)
    assert found["perplexity"]["a"] == pytest.approx(np.exp(-a[rows, answer].mean()), rel=1e-4)
    assert found["perplexity"]["b"] == pytest.approx(np.exp(-b[rows, answer].mean()), rel=1e-4)
    kl = (np.exp(a) * (a - b)).sum(1)
    assert found["kl_nats"]["mean"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["kl_nats"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    apart = a.argmax(1) != b.argmax(1)
    assert found["argmax_agreement"]["disagreeing"] == apart.sum() > 0, "too little noise: nothing is tested"
    margins = np.diff(np.sort(a, 1)[:, -2:])[:, 0]
    assert found["margin_nats"]["disagreeing"]["median"] == pytest.approx(np.median(margins[apart]), rel=1e-3)
    for counts in (found["kl_nats"]["histogram"]["counts"], [each["positions"] for each in found["by_position"]]):
        assert sum(counts) == len(answer)
    assert sessions[0].slots.free == sessions[1].slots.free == 1


def test_heads_are_counted_where_both_sides_choose_the_answers_token(sessions: tuple[Session, Session], report: dict[str, Any]):
    for session in sessions:  # alone with its own answers, a side has the hits that tree counts
        answers = [session.generate(token_ids=p, speculative=False, max_new_tokens=TOKENS).token_ids for p in PROMPTS]
        alone = paired_hits({"a": session}, list(zip(PROMPTS, answers, strict=True)))
        table = count_hits(session, PROMPTS, TOKENS)
        assert (alone["positions"], alone["left_out"]) == (table.positions, 0)
        assert alone["a"]["top1"] == pytest.approx(table.rates[:, 0])
        assert alone["a"]["top5"] == pytest.approx(table.rates.sum(1))
    heads, answers = report["heads"], report["answers"]
    assert heads["left_out"] == answers["argmax_agreement"]["disagreeing"] > 0
    assert 0 < heads["positions"] <= answers["positions"] - heads["left_out"]


def test_a_text_is_read_alike_in_steps_of_any_size(sessions: tuple[Session, Session]):
    """What is given is prefilled, the rest comes in steps: where the border lies changes no prediction."""
    text = [*PROMPTS[0], *PROMPTS[1], *PROMPTS[2]]
    found = []
    for given, rows in ((0, 8), (1, 8), (2, 8), (1, 1)):
        agreement = Agreement(*sessions, rows)
        agreement.read(text[:40], given)
        found.append(np.concatenate([part.kl for part in agreement._parts]))
    np.testing.assert_allclose(found[0], found[1])
    np.testing.assert_allclose(found[1][1:], found[2], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found[1], found[3], rtol=1e-3, atol=1e-7)


def test_nothing_to_read_and_broken_logits_are_refused(sessions: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch):
    agreement = Agreement(*sessions, 8)
    agreement.read(PROMPTS[0], len(PROMPTS[0]))
    with pytest.raises(UsageError, match="no token to predict"):
        agreement.report()
    broken = lambda self, tokens: np.full((len(tokens), 4), np.nan)  # noqa: E731
    monkeypatch.setattr("medusa_deploy.tools.measure.probe.Probe.chain_logits", broken)
    with pytest.raises(NumericsError, match="NaN"):
        agreement.read([1, 2, 3], 1)


def test_layers_differ_by_what_transformers_says(sessions: tuple[Session, Session], tiny_model: Path, other_model: Path):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([PROMPTS[0]])
    states = []
    for model in (tiny_model, other_model):
        with torch.no_grad():
            module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).model
            states.append(module(tokens, output_hidden_states=True).hidden_states[1].numpy()[0])
    found = layers_module.layer_errors(*sessions, [PROMPTS[0]], 1)
    expected = np.linalg.norm(states[1] - states[0]) / np.linalg.norm(states[0])
    assert found["relative_rms"][0] == pytest.approx(expected, rel=1e-3)
    rows = np.linalg.norm(states[1] - states[0], axis=1) / np.linalg.norm(states[0], axis=1)
    assert found["median"][0] == pytest.approx(np.median(rows), rel=1e-3)
    assert found["positions"] == len(PROMPTS[0])


def test_layers_that_one_graph_hides_are_not_comparable(
    sessions: tuple[Session, Session], report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from medusa_deploy.calibration.int8 import layer_states

    find = layer_states.layer_outputs
    monkeypatch.setattr(layer_states, "layer_outputs", lambda nodes, count: [None, find(nodes, count)[1]])
    found = layers_module.layer_errors(*sessions, PROMPTS, 1)
    assert found["not_comparable"] == [0]
    assert found["median"][0] is None and found["median"][1] > 0
    shown = {**report, "layers": found}
    assert "layers that can't be compared: 0" in describe(shown)
    assert "Not comparable: 0." in page(shown)
    monkeypatch.setattr(layer_states, "layer_outputs", lambda nodes, count: [None] * count)
    nothing = {**report, "layers": layers_module.layer_errors(*sessions, PROMPTS, 1)}
    assert "not comparable" in describe(nothing) and "No layer is comparable" in page(nothing)


def test_another_model_is_over_the_budget(report: dict[str, Any]):
    assert report["answers"]["perplexity"]["increase_percent"] > 2
    assert report["greedy"]["identical"] < len(PROMPTS)
    assert report["layers"]["median"][1] > report["layers"]["median"][0] > 0.01
    assert not report["verdict"]["passed"]
    assert report["exactness"]["b"]["unexplained"] == 0, "it decodes exactly, something else"


@pytest.mark.parametrize(
    ("increase", "ratio", "unexplained", "failed"),
    [
        (2.0, 0.98, 0, []),
        (-5.0, 1.2, 0, []),
        (2.01, 1.0, 0, ["perplexity_increase_percent"]),
        (0.0, 0.979, 0, ["acceptance_ratio"]),
        (0.0, 1.0, 1, ["unexplained_divergences"]),
        (float("nan"), 1.0, 0, ["perplexity_increase_percent"]),
    ],
)
def test_a_budget_is_judged_check_by_check(increase: float, ratio: float, unexplained: int, failed: list[str]):
    found = {
        "answers": {"perplexity": {"increase_percent": -9.0}},
        "prose": {"perplexity": {"increase_percent": increase}},
        "acceptance": {"ratio": ratio},
        "exactness": {"b": {"unexplained": unexplained}},
    }
    verdict = judge(found, QualityBudget())
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == failed
    assert verdict["passed"] == (not failed)


def test_other_vocabularies_and_what_does_not_fit_are_refused_before_anything_runs(
    tiny_bundle: Path, tmp_path: Path, tiny_session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    one, two = (text_bundle(tiny_bundle, tmp_path / name) for name in ("one", "two"))
    tokenizer = two / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8") + "\n", "utf-8")
    raw = json.loads((two / "manifest.json").read_text("utf-8"))
    raw["files"] = {name: dataclasses.asdict(record) for name, record in record_files(two).items()}
    (two / "manifest.json").write_text(json.dumps(raw), "utf-8")
    assert cli.main(["compare", str(one), str(two), *OPTIONS]) == 1
    shown = capsys.readouterr().err
    assert "other tokenizers for their 128 and 128 tokens" in shown and "hint: compare bundles of one model" in shown
    other = load(tiny_bundle, threads=1)
    facts = dataclasses.replace(other.manifest.backbone, vocab_size=99)
    other.manifest = dataclasses.replace(other.manifest, backbone=facts)
    monkeypatch.setattr(Session, "stream", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(VocabularyMismatchError, match="vocabularies of 128 and 99 tokens"):
        compare(tiny_session, other, PROMPTS)
    with pytest.raises(CapacityError, match="prompt 1"):
        compare(tiny_session, tiny_session, [[1] * 250])
    with pytest.raises(CapacityError, match="17 rows, the bundles take 1 to 16"):
        compare(tiny_session, tiny_session, PROMPTS, rows=17)
    with pytest.raises(UsageError, match="0 prompts"):
        compare(tiny_session, tiny_session, [])


def test_a_graph_whose_rows_depend_on_each_other_is_told_apart(report: dict[str, Any]):
    """Gap within the noise, and noise beyond rounding: what quantised activations do."""
    found = {"prompt": 0, "position": 2, "plain_token": 5, "other_token": 6, "gap": 0.1, "noise": 0.4, "explained": False}
    tally = {"first_divergences": [{**found, "limit": 0.003}] * 5}
    shown = {**report, "exactness": {**report["exactness"], "b": {"fixed_rows": tally, "medusa": tally, "unexplained": 10}}}
    for text in (describe(shown), page(shown)):
        assert "and 7 more" in text and "computes a row alone otherwise" in text
    tally["first_divergences"] = [{**found, "gap": 2.0, "noise": 1e-5, "limit": 0.003}]
    assert "gap 2, noise 1e-05" in describe(shown) and "otherwise" not in describe(shown)


def test_the_page_shows_every_figure_of_the_table(report: dict[str, Any]):
    text = page(report)
    read = Reader(text)
    assert read.open == []
    assert read.seen.count("svg") == 6
    words = "".join(read.words)
    for line in describe(report).splitlines()[6:]:
        assert re.split(r" {2,}", line.strip())[-1] in words
    assert "Fail" in words and "over its budget" in words and "noisy, cpu, float32" in words
