"""What fails on the GPU ends the slots of its own call, and nothing is lost that had been accepted before."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Session, load
from medusa_deploy.runtime.errors import DeviceError, DeviceMemoryError, EngineError, NumericsError
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.step_plan import SlotResult, StepPlan, Wanted
from medusa_deploy.runtime.executors.tensorrt.context import Contexts
from medusa_deploy.runtime.executors.tensorrt.cuda import Cuda
from medusa_deploy.runtime.tree import Tree
from support.fake_engine import load_fake
from support.fake_trt import FakeTrt
from support.plan_driver import Caller, chunk, succeeded

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Session:
    """The CPU, one slot, and heads in the engine's precision."""
    return load(tiny_bundle, threads=1, variant="standard")


@pytest.mark.parametrize("before", range(1, 8))
@pytest.mark.parametrize(
    ("kind", "name", "call", "follow"),
    [
        (Cuda, "wait", 0, True),
        (Cuda, "wait", 0, False),
        (Contexts, "enqueue", 0, True),
        (Contexts, "enqueue", 0, False),
        (Contexts, "enqueue", 1, False),
        (Cuda, "download", 0, True),
        (Cuda, "download", 0, False),
        (Cuda, "upload", 1, False),
    ],
    ids=["a step that ran ahead", "a step", "the step after it", "enqueueing it", "the step after that",
         "the results of the step after it", "its results", "its inputs"],
)  # fmt: skip
def test_after_an_exception_the_sequence_can_go_on_where_it_was(
    engine_bundle: Path,
    reference: Session,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    name: str,
    call: int,
    follow: bool,
    before: int,
) -> None:
    """A step in flight is discarded with the one that failed; what it moved stays moved."""
    executor = load_fake(engine_bundle, monkeypatch).executor
    caller = Caller(executor)
    emitted = [caller.prompt(0, [4, 5, 6])]
    for _ in range(before):
        emitted += caller.step(caller.verifies(0, WIDE), follow=WIDE if follow else None)[0]
    plan = caller.plan([caller.verifies(0, WIDE)], WIDE)
    method, calls = getattr(kind, name), itertools.count()

    def fails(*arguments: Any) -> Any:
        if next(calls) == call:
            raise DeviceError("it failed")
        return method(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, fails)
        assert isinstance(executor.run(plan).slots[0], DeviceError)
    emitted += caller.commit(plan, succeeded(executor.run(plan)))[0]
    emitted += caller.greedy(0, WIDE, 40)
    expected = reference.generate(token_ids=[4, 5, 6], max_new_tokens=len(emitted), ignore_eos=True)
    assert emitted == expected.token_ids


def test_without_host_memory_for_logits_no_part_of_the_plan_is_run(
    engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(load_fake(engine_bundle, monkeypatch, gpu, slots=2).executor)
    caller.prompt(0, [4, 5, 6])
    plan = caller.plan([caller.verifies(0, WIDE), chunk(1, [7] * 9, Wanted(logits=True))])
    with monkeypatch.context() as patch:
        patch.setattr(gpu.cuda, "cudaHostAlloc", lambda *_: (gpu.cuda.cudaError_t.cudaErrorMemoryAllocation, None))
        failed = caller.executor.run(plan).slots
    assert all(isinstance(each, DeviceMemoryError) and "logits" in each.message for each in failed)
    assert succeeded(caller.executor.run(plan))[1].logits is not None


@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("tree", [ROOT_ONLY, WIDE], ids=["plain", "tree"])
def test_nan_ends_the_sequence_that_has_it_and_no_other(
    engine_bundle: Path, gpu: FakeTrt, reference: Session, monkeypatch: pytest.MonkeyPatch, tree: Tree, before: int
) -> None:
    session = load_fake(engine_bundle, monkeypatch, gpu, slots=2)
    prompts = [[4, 5, 6], [9] * 10]
    streams = [session.stream(token_ids=prompt, max_new_tokens=60, tree=tree, ignore_eos=True) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for _ in range(2 + before):
        for index in (0, 1):
            found[index] += next(streams[index]).token_ids

    def spoil(outputs: dict[str, np.ndarray]) -> None:
        if len(outputs[step_io.LAST_ROW]) == 2:
            outputs[step_io.STATE_SUM][1] = np.nan

    gpu.outputs = spoil
    with pytest.raises(NumericsError, match="NaN"):
        for piece in streams[1]:
            found[1] += piece.token_ids
    gpu.outputs = lambda _found: None
    found[0] += [token for piece in streams[0] for token in piece.token_ids]
    for index, prompt in enumerate(prompts):
        expected = reference.generate(token_ids=prompt, max_new_tokens=60, ignore_eos=True).token_ids
        assert found[index] == expected[: len(found[index])]
    assert len(found[0]) == 60 and len(found[1]) < 60
    assert session.slots.free == 2 and not session.loop.tick()


@pytest.mark.parametrize("follow", [True, False])
def test_a_slot_that_held_nan_serves_its_next_prompt(
    engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    """NaN lies in the slot's cache and among the rows that the next step takes over; a step may be in flight."""
    caller = Caller(load_fake(engine_bundle, monkeypatch, gpu, slots=2).executor)
    prompt, other = [4, 5, 6], [9] * 10
    first = caller.prompt(1, prompt)
    expected = [first, *caller.greedy(1, WIDE, 8)]
    caller.prompt(0, other)
    fresh = Caller(load_fake(engine_bundle, monkeypatch, slots=2).executor)
    fresh.prompt(0, other)
    alone = fresh.greedy(0, WIDE, 30)

    def spoil(outputs: dict[str, np.ndarray]) -> None:
        if len(outputs[step_io.LAST_ROW]) == 2:
            for name in [*step_io.present_names(2), *step_io.new_names(2)]:
                outputs[name][1] = np.nan
            outputs[step_io.STATE_SUM][1] = np.nan

    gpu.outputs = spoil
    plan = caller.plan([caller.verifies(0, WIDE), caller.verifies(1, WIDE)], WIDE if follow else None)
    results = succeeded(caller.executor.run(plan))
    assert [each.finite for each in results] == [True, False]
    gpu.outputs = lambda _found: None
    emitted = caller.commit(plan, results)[0]
    caller.lengths[1], caller.moves[1] = 0, ()
    emitted += caller.step(caller.verifies(0, WIDE), chunk(1, prompt, Wanted(heads=True)))[0]
    caller.lengths[1], caller.moves[1] = 0, ()
    assert caller.prompt(1, prompt) == first
    emitted += caller.greedy(0, WIDE, 8)
    assert [first, *caller.greedy(1, WIDE, 8)] == expected
    assert emitted == alone[: len(emitted)]


def test_a_chunk_that_fails_ends_its_slot_alone(
    engine_bundle: Path, gpu: FakeTrt, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = load_fake(engine_bundle, monkeypatch, gpu, slots=2).executor
    caller = Caller(executor)
    emitted = [caller.prompt(0, [4, 5, 6])]
    emitted += caller.greedy(0, WIDE, 10)
    plan = caller.plan([caller.verifies(0, WIDE), chunk(1, [7] * 9)])
    gpu.refuse = 1  # the step is a graph, the chunk isn't
    decoded, refused = executor.run(plan).slots
    assert isinstance(decoded, SlotResult) and isinstance(refused, EngineError)
    caller.moves[1] = ()
    emitted += caller.commit(StepPlan(plan.active[:1], plan.lengths, plan.moves), [decoded])[0]
    emitted += caller.greedy(0, WIDE, 10)
    assert emitted == reference.generate(token_ids=[4, 5, 6], max_new_tokens=len(emitted), ignore_eos=True).token_ids
