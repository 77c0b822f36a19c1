"""verify finds nothing wrong with a right bundle, and does find what is wrong with a sabotaged one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import CapacityError
from medusa_deploy.runtime.executors.step_plan import StepPlan
from medusa_deploy.runtime.sampling import SamplingParams
from medusa_deploy.runtime.session import Session
from medusa_deploy.runtime.tree import Shape, Tree
from medusa_deploy.tools import cli
from medusa_deploy.tools.exactness.first_divergence import first_divergence
from medusa_deploy.tools.exactness.verify import verify
from medusa_deploy.tools.measure.probe import Probe
from medusa_deploy.tools.prompt_source import random_prompts
from medusa_deploy.tools.tree_set import NAMES, TreeSet, trees_for
from support.faulty import wrong_next_tokens, wrong_plans

PROMPTS = random_prompts(128, 256, 3, seed=5)
TOKENS = 24


@pytest.fixture(scope="module")
def trees(tiny_session: Session) -> TreeSet:
    return trees_for(tiny_session.manifest)


@pytest.mark.parametrize(
    ("plain", "other", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [1], 0), ([], [], None), ([5, 2], [1, 2], 0)],
)
def test_first_divergence(plain: list[int], other: list[int], position: int | None):
    assert first_divergence(plain, other) == position


def test_a_right_bundle_has_nothing_unexplained(tiny_session: Session, trees: TreeSet):
    seen: list[int] = []
    report = verify(
        tiny_session, PROMPTS, trees=trees.trees, max_new_tokens=TOKENS, progress=lambda done, _note: seen.append(done)
    )
    assert report["unexplained"] == 0
    assert list(report["trees"]) == list(NAMES)
    for entry in report["trees"].values():
        assert entry["prompts"] == len(PROMPTS)
        assert entry["tokens_compared"] == len(PROMPTS) * TOKENS or entry["divergences"]
        assert entry["divergences"] == entry["explained"] + entry["unexplained"] == len(entry["first_divergences"])
    assert report["trees"]["root"]["mean_acceptance_length"] == 1
    assert report["trees"]["chain"]["mean_acceptance_length"] > 1, "no draft was ever accepted: nothing was verified"
    assert seen == list(range(1, len(PROMPTS) * 7 + 1))


def test_a_run_that_is_killed_leaves_what_it_found(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second prompt's second run never ends well; the first prompt's comparison is on disk."""
    calls: list[int] = []
    generate = Session.generate

    def dying(self: Session, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    monkeypatch.setattr(Session, "generate", dying)
    report = tmp_path / "report.json"
    options = ["--trees", "chain", "--count", "2", "--max-new-tokens", "4", "--json", str(report)]
    assert cli.main(["verify", str(tiny_bundle), *options]) != 0
    found = json.loads(report.read_text())
    assert (found["complete"], found["prompts"], found["trees"]["chain"]["prompts"]) == (False, 1, 1)


def test_rows_chosen_in_each_step_are_verified_too(tiny_session: Session):
    report = verify(tiny_session, PROMPTS[:1], trees={}, best_rows=True, max_new_tokens=TOKENS)
    assert report["unexplained"] == 0
    assert list(report["trees"]) == ["best-rows", "automatic"]
    assert report["trees"]["best-rows"]["rows"] == tiny_session.tree.rows


def test_sampled_tokens_are_equal_for_equal_seeds(tiny_session: Session, trees: TreeSet):
    sample = SamplingParams(mode="sample", seed=11)
    report = verify(tiny_session, PROMPTS, trees={"wide": trees.trees["wide"]}, max_new_tokens=TOKENS, sample=sample)
    assert report["mode"] == "sample"
    assert report["unexplained"] == 0
    assert report["trees"]["wide"]["tokens_compared"] == len(PROMPTS) * TOKENS


def test_wrong_positions_are_found(tiny_session: Session, trees: TreeSet, monkeypatch: pytest.MonkeyPatch):
    """Drafted rows that stand where the root stands: their logits are wrong, and no rounding is to blame."""

    def flat(plan: StepPlan) -> StepPlan:
        shapes = [Shape(rows.shape.parents, 0 * rows.shape.depths, rows.shape.ancestors) for rows in plan.active]
        changed = [
            rows if rows.prefills else dataclasses.replace(rows, shape=shape)
            for rows, shape in zip(plan.active, shapes, strict=True)
        ]
        return dataclasses.replace(plan, active=tuple(changed))

    wrong_plans(monkeypatch, flat)
    report = verify(tiny_session, PROMPTS, trees={"chain": trees.trees["chain"]}, max_new_tokens=TOKENS)
    assert report["unexplained"] == report["trees"]["chain"]["unexplained"] > 0


def test_a_lost_commit_is_found(tiny_session: Session, monkeypatch: pytest.MonkeyPatch):
    """Accepted rows of a branch stay where they were written: the next steps look at rejected ones."""
    wrong_plans(monkeypatch, lambda plan: dataclasses.replace(plan, moves=((),) * len(plan.moves)))
    tree = Tree.from_choices([(1,), (2,), (3,), (0,), (0, 1), (0, 0), (0, 0, 1), (0, 0, 0)])
    report = verify(tiny_session, PROMPTS, trees={"wide": tree}, max_new_tokens=TOKENS)
    assert report["unexplained"] > 0
    [found, *_] = [found for found in report["trees"]["wide"]["first_divergences"] if not found["explained"]]
    assert found["gap"] > 2 * found["noise"]
    assert found["plain_token"] != found["other_token"]


def test_a_run_that_stops_short_is_unexplained(tiny_session: Session, trees: TreeSet, monkeypatch: pytest.MonkeyPatch):
    generate = tiny_session.generate

    def short(*arguments: Any, **options: Any) -> Any:
        generation = generate(*arguments, **options)
        return dataclasses.replace(generation, token_ids=generation.token_ids[: None if "speculative" in options else -1])

    monkeypatch.setattr(tiny_session, "generate", short)
    report = verify(tiny_session, PROMPTS[:1], trees={"root": trees.trees["root"]}, max_new_tokens=4)
    [found] = report["trees"]["root"]["first_divergences"]
    assert (found["position"], found["other_token"], found["explained"]) == (3, None, False)


def test_the_probe_computes_one_position_alike_in_all_ways(tiny_session: Session, trees: TreeSet):
    prompt = PROMPTS[0]
    plain = tiny_session.generate(token_ids=prompt, speculative=False, max_new_tokens=20, ignore_eos=True).token_ids
    context = [*prompt, *plain[:-1]]
    with Probe(tiny_session) as probe:
        ways = [probe.replay(prompt, plain[:-1]), probe.prefill(context)]
        probe.restart(context[:-1])
        ways.append(probe.root_logits(context[-1], trees.trees["wide"]))
    for way in ways:
        assert int(way.argmax()) == plain[-1]
        np.testing.assert_allclose(way, ways[0], atol=1e-4)
    assert tiny_session.slots.free == tiny_session.slots.slots


def test_prompts_without_room_are_refused_before_anything_runs(tiny_session: Session):
    with pytest.raises(CapacityError, match="prompt 1"):
        verify(tiny_session, [[1] * 250], trees={}, max_new_tokens=64)


def test_the_verb_reports_and_exits_with_0(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "verify.json"
    options = ["--count", "1", "--max-new-tokens", "6", "--trees", "chain,best-rows,wide", "--sampled", "--json", str(output)]
    assert cli.main(["verify", str(tiny_bundle), *options]) == 0
    assert "no unexplained divergence" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["unexplained"] == 0
    assert list(report["trees"]) == list(report["sampled"]["trees"]) == ["chain", "wide", "best-rows", "automatic"]
    assert report["environment"]["bundle"]["variant"] == "cpu"
    assert report["notes"] == {}


def test_the_verb_exits_with_1_when_something_is_unexplained(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wrong_next_tokens(monkeypatch, lambda turn: turn.sequence.drafter.rows > 1, 128)
    assert cli.main(["verify", str(tiny_bundle), "--count", "1", "--max-new-tokens", "4", "--trees", "chain"]) == 1
    shown = capsys.readouterr().out
    assert "1 UNEXPLAINED" in shown
    assert "gap" in shown


def test_prompts_together_are_compared_with_each_alone(tiny_bundle: Path):
    session = load(tiny_bundle, slots=3, threads=1)
    report = verify(session, PROMPTS, trees={}, best_rows=True, max_new_tokens=TOKENS)
    assert report["unexplained"] == 0
    together = [name for name in report["trees"] if name.startswith("together, ")]
    assert together == ["together, plain", "together, best-rows", "together, automatic"]
    assert all(report["trees"][name]["tokens_compared"] == len(PROMPTS) * TOKENS for name in together), "fp32 is exact"


def test_what_company_changes_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    session = load(tiny_bundle, slots=3, threads=1)
    wrong_next_tokens(monkeypatch, lambda turn: session.slots.free < 2, 128)
    report = verify(session, PROMPTS, trees={}, max_new_tokens=TOKENS)
    assert report["trees"]["together, plain"]["unexplained"] > 0


def test_transformers_agrees(tiny_session: Session, tiny_model: Path):
    from medusa_deploy.tools.exactness.reference import load_reference

    reference = load_reference(tiny_model, "float32")
    report = verify(tiny_session, PROMPTS[:2], trees={}, max_new_tokens=TOKENS, reference=reference)
    assert report["reference"]["unexplained"] == 0
    assert report["reference"]["tokens_compared"] > 0
    assert reference.logits(PROMPTS[0]).shape == (128,)


def test_another_model_is_no_reference(tiny_session: Session, tmp_path: Path):
    from medusa_deploy.tools.exactness.reference import load_reference
    from support.tiny import make_tiny_model

    reference = load_reference(make_tiny_model(tmp_path / "other", seed=1), "float32")
    report = verify(tiny_session, PROMPTS[:1], trees={}, max_new_tokens=TOKENS, reference=reference)
    assert report["unexplained"] == report["reference"]["unexplained"] == 1
