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
            outputs[step_io.LOG_PROBS][1] = np.nan

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
