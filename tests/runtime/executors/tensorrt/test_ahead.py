"""Steps that run ahead of the host emit what the CPU emits, whoever else decodes, stops or fails beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Request, SamplingParams, Session, load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.step_plan import SlotResult, StepPlan, StepResult
from medusa_deploy.runtime.executors.tensorrt import executor as trt
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.tree import Tree, chain
from support.fake_cuda import FakeRuntime
from support.fake_engine import load_fake
from support.fake_trt import FakeTrt
from support.plan_driver import Caller
from support.tiny import HEADS, VOCAB
from support.trees import prefix_closed

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
_trees = prefix_closed(depth=HEADS, top_k=4, max_rows=16).map(Tree.from_choices)
_prompts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=40)
Load = Callable[..., Session]


@pytest.fixture(scope="module")
def sessions(engine_bundle: Path) -> Iterator[dict[int, Session]]:
    """Sessions of 1 and 3 slots on a fake GPU, with small steps of the visible length so that it changes often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "COLUMN_BUCKET", 32)
        yield {slots: load_fake(engine_bundle, patch, FakeTrt(FakeRuntime()), slots=slots) for slots in (1, 3)}


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Session:
    """The CPU, one slot, and heads in the engine's precision."""
    return load(tiny_bundle, threads=1, variant="standard")


def _settled(session: Session) -> None:
    """Nobody holds a slot, and nothing is left to do or to move. A step in flight is nobody's: the next request discards it."""
    assert session.slots.free == session.slots.slots
    assert not any(session.slots.moves)
    assert not session.loop.tick()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=_trees, prompt=_prompts, count=st.integers(1, 70), eos=st.booleans())
def test_any_tree_emits_plain_greedy(
    sessions: dict[int, Session], reference: Session, tree: Tree, prompt: list[int], count: int, eos: bool
) -> None:
    options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": count, "ignore_eos": not eos}
    plain = reference.generate(speculative=False, **options)
    found = sessions[1].generate(tree=tree, **options)
    assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)
    assert found.stats.accepted == reference.generate(tree=tree, **options).stats.accepted
    _settled(sessions[1])


_requests = st.builds(
    Request,
    token_ids=_prompts,
    max_new_tokens=st.integers(1, 30),
    params=st.sampled_from(
        [
            SamplingParams(),
            SamplingParams(),
            SamplingParams(mode="sample", temperature=0.7, seed=3),
            SamplingParams(presence_penalty=0.3),
        ]
    ),
    tree=st.sampled_from([None, ROOT_ONLY, chain(2), WIDE, WIDE]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(_requests, min_size=1, max_size=6))
def test_many_at_a_time_with_sampled_ones_among_them(
    sessions: dict[int, Session], reference: Session, requests: list[Request]
) -> None:
    found = dict(sessions[3].generate_many(requests))
    for index, request in enumerate(requests):
        (expected,) = (generation for _, generation in reference.generate_many([request]))
        assert (found[index].token_ids, found[index].finish_reason) == (expected.token_ids, expected.finish_reason)
    _settled(sessions[3])


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_a_cancelled_stream_leaves_nothing_behind(
    sessions: dict[int, Session], reference: Session, slots: int, after: int
) -> None:
    session, options = sessions[slots], {"token_ids": [4, 5, 6], "max_new_tokens": 40, "ignore_eos": True, "tree": WIDE}
    calls = iter(range(100))
    cancelled = session.generate(cancel=lambda: next(calls) >= after, **options)  # type: ignore[arg-type]
    assert cancelled.finish_reason == "cancelled"
    stream = session.stream(**options)  # type: ignore[arg-type]
    for _ in range(after):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    _settled(session)
    options["token_ids"] = [9] * 20
    assert session.generate(**options).token_ids == reference.generate(**options).token_ids  # type: ignore[arg-type]


def test_streams_that_take_turns_discard_nothing(
    engine_bundle: Path, gpu: FakeTrt, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load_fake(engine_bundle, monkeypatch, gpu, slots=3)
    plans: list[StepPlan] = []
    method = TrtExecutor.run
    monkeypatch.setattr(TrtExecutor, "run", lambda self, plan: (plans.append(plan), method(self, plan))[1])
    prompts = [[4, 5, 6], [9] * 20]
    streams = [session.stream(token_ids=prompt, max_new_tokens=40, tree=WIDE, ignore_eos=True) for prompt in prompts]
    found: list[list[int]] = [[], []]
    ahead = 0
    for _ in range(8):
        for index in (0, 1):
            found[index] += next(streams[index]).token_ids
            asked = sum(any(not rows.prefills for rows in plan.active) for plan in plans)
            asked += sum(rows.prefills for plan in plans for rows in plan.active)
            ahead = gpu.cuda.calls["copy DeviceToHost"] - asked  # each call brings its results by one copy
            assert ahead in (0, 1), "all that was run but for the newest was asked for"
    assert ahead == 1 and len(plans[-1].active) == 2, "both are in one step, and the next one is under way"
    for index in (0, 1):
        found[index] += [token for chunk in streams[index] for token in chunk.token_ids]
        expected = reference.generate(token_ids=prompts[index], max_new_tokens=40, tree=WIDE, ignore_eos=True)
        assert found[index] == expected.token_ids


def test_heads_run_beside_a_step_in_flight(sessions: dict[int, Session], reference: Session) -> None:
    """Their results are the step's own, and the step in flight is collected afterwards as if nothing had been."""
    caller = Caller(sessions[3].executor)
    emitted = [caller.prompt(1, [4, 5, 6])]
    hidden = np.random.default_rng(0).normal(size=(2, sessions[3].manifest.backbone.hidden_size)).astype(np.float32)
    roots = np.array([5, 6], np.int64)
    expected = reference.executor.propose(hidden, roots)
    for _ in range(6):
        emitted += caller.step(caller.verifies(1, WIDE), follow=WIDE)[0]
        for mine, theirs in zip(caller.executor.propose(hidden, roots), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert emitted == reference.generate(token_ids=[4, 5, 6], max_new_tokens=len(emitted), ignore_eos=True).token_ids


def test_a_prompt_between_two_steps_does_not_move_another_slots_rows(sessions: dict[int, Session], reference: Session) -> None:
    """The second prompt comes while the first sequence's newest rows still lie outside the cache."""
    session = sessions[3]
    expected = {
        tuple(prompt): reference.generate(token_ids=prompt, max_new_tokens=30, ignore_eos=True).token_ids
        for prompt in ([4, 5, 6], [9] * 33)
    }
    for before in range(1, 8):
        first = session.stream(token_ids=[4, 5, 6], max_new_tokens=30, tree=WIDE, ignore_eos=True)
        found = [token for _ in range(before) for token in next(first).token_ids]
        second = session.generate(token_ids=[9] * 33, max_new_tokens=30, tree=WIDE, ignore_eos=True)
        found += [token for chunk in first for token in chunk.token_ids]
        assert found == expected[4, 5, 6]
        assert second.token_ids == expected[tuple([9] * 33)]


def test_what_a_step_emits_is_what_the_graph_says_that_it_emits(on_gpu: Load, gpu: FakeTrt) -> None:
    """``emitted`` leaves the device beside the rows that the host reads it from."""
    session = on_gpu()
    said: list[list[int]] = []
    gpu.outputs = lambda found: said.append([int(token) for token in found[step_io.EMITTED][0] if token >= 0])
    pieces = list(session.stream(token_ids=[4, 5, 6], max_new_tokens=60, tree=WIDE, ignore_eos=True))
    checked = 0
    for index, piece in enumerate(pieces[1:-2], start=1):  # neither the prompt's nor what the length limit cuts
        assert said[index] == piece.token_ids
        checked += len(piece.token_ids) > 1
    assert checked > 2


def test_the_tokens_that_the_device_drafts_are_those_that_the_host_would_draft(
    engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host asks for a step by its tokens; one that drafted others is not taken for it."""
    executor = load_fake(engine_bundle, monkeypatch, gpu).executor
    made: list[np.ndarray] = []
    gpu.outputs = lambda found: made.append(found[step_io.NEXT_TOKENS][0].copy())
    caller = Caller(executor)
    caller.prompt(0, [4, 5, 6])
    for _ in range(6):
        caller.step(caller.verifies(0, WIDE), follow=WIDE)
        rows = caller.verifies(0, WIDE)
        assert any(np.array_equal(tokens[: WIDE.rows], rows.tokens) for tokens in made[-2:])
    rows.tokens[-1] = (rows.tokens[-1] + 1) % VOCAB
    calls = gpu.cuda.calls["copy HostToDevice"]
    result: StepResult = executor.run(caller.plan([rows], WIDE))
    assert isinstance(result.slots[0], SlotResult)
    assert gpu.cuda.calls["copy HostToDevice"] == calls + 2, "the host's own step"
