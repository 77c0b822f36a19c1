"""Any plans, one after another: the TensorRT executor returns what the CPU's returns, whether or not a step was in flight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, load
from medusa_deploy.runtime.errors import DeployError
from medusa_deploy.runtime.executors.executor import Executor
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, Wanted
from medusa_deploy.runtime.executors.tensorrt import executor as trt
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.executors.tensorrt.following import Following
from medusa_deploy.runtime.executors.tensorrt.staging import DeviceInputs
from medusa_deploy.runtime.tree import Tree, chain
from support.fake_cuda import DeviceFaultError, FakeRuntime
from support.fake_engine import load_fake
from support.fake_trt import FakeTrt
from support.plan_driver import HEADS_WANTED, Caller, chunk, succeeded
from support.tiny import VOCAB

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
TREES = (ROOT_ONLY, chain(2), chain(3), WIDE, WIDE, WIDE)
SLOTS = 3
ALL = Wanted(heads=True, logits=True, hidden=True)


@pytest.fixture(scope="module", params=[False, True], ids=["slow", "fast"])
def executors(request: pytest.FixtureRequest, engine_bundle: Path, tiny_bundle: Path) -> Iterator[tuple[Executor, Executor]]:
    """The one on a fake GPU, with small steps of the visible length so that it changes often, and the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "COLUMN_BUCKET", 32)
        session = load_fake(engine_bundle, patch, FakeTrt(FakeRuntime(fast=request.param)), slots=SLOTS)
        yield session.executor, load(tiny_bundle, slots=SLOTS, threads=1, variant="standard").executor


def _same(found: list[SlotResult], expected: list[SlotResult]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.last_row, mine.next_token, mine.finite) == (theirs.last_row, theirs.next_token, True)
        assert mine.seconds > 0
        for name in ("candidates", "log_probs", "logits", "hidden"):
            one, other = getattr(mine, name), getattr(theirs, name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, atol=1e-4)


def _rows(caller: Caller, rng: np.random.Generator, slot: int, tree: Tree) -> SlotRows | None:
    """What ``slot`` does next: it rests, begins again behind some of its rows, reads on, or decodes."""
    what = rng.integers(0, 12)
    length = caller.lengths[slot]
    if what == 0:
        return None
    if what == 1 or length > 180:
        caller.lengths[slot] = int(rng.integers(0, length - len(caller.moves[slot]) + 1)) if length < 180 else 0
        caller.moves[slot] = ()
    elif caller.candidates[slot] is not None:
        wanted = ALL if rng.integers(0, 8) == 0 else HEADS_WANTED
        return caller.verifies(slot, WIDE if rng.integers(0, 10) == 0 else tree, wanted)
    tokens = rng.integers(0, VOCAB, int(rng.integers(1, 17))).tolist()
    return chunk(slot, tokens, ALL if rng.integers(0, 4) == 0 else HEADS_WANTED if rng.integers(0, 4) else Wanted())


def _run_any_plans(mine: Executor, theirs: Executor, seed: int) -> None:
    """``follow`` is a guess: the next plan may be another one, and a sequence may keep less than was accepted."""
    rng, caller = np.random.default_rng(seed), Caller(mine)
    tree, busy = WIDE, list(range(SLOTS))
    for _ in range(60):
        if rng.integers(0, 8) == 0:
            tree = TREES[rng.integers(0, len(TREES))]
            busy = [slot for slot in range(SLOTS) if rng.integers(0, 3)]
        active = [rows for slot in busy if (rows := _rows(caller, rng, slot, tree)) is not None]
        rng.shuffle(active)  # type: ignore[arg-type]
        plan = caller.plan(active, tree if rng.integers(0, 5) else None)
        found, expected = succeeded(mine.run(plan)), succeeded(theirs.run(plan))
        _same(found, expected)
        caller.commit(plan, found, most=0 if rng.integers(0, 20) == 0 else None)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_plans_give_the_cpus_results(executors: tuple[Executor, Executor], seed: int) -> None:
    _run_any_plans(*executors, seed)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_slot_that_ended_in_flight_stays_where_it_is(
    engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """The step in flight serves the slots that go on. A step after it would let the other one grow past its cache's end."""
    caller = Caller(load_fake(engine_bundle, monkeypatch, gpu, slots=2).executor)
    caller.prompt(0, [4, 5, 6])
    caller.prompt(1, [9] * 235)
    copies = gpu.cuda.calls["copy HostToDevice"]
    caller.step(caller.verifies(0, WIDE), caller.verifies(1, WIDE), follow=WIDE)
    caller.step(caller.verifies(0, WIDE), follow=WIDE)
    assert gpu.cuda.calls["copy HostToDevice"] == copies + 2, "nothing was started anew"
    if not right:
        monkeypatch.setattr(Following, "after", _with_ended_slots(Following.after))
        caller.step(caller.verifies(0, WIDE), caller.verifies(1, WIDE), follow=WIDE)
    with contextlib.nullcontext() if right else pytest.raises(DeviceFaultError):
        caller.greedy(0, WIDE, 60)


def _with_ended_slots(after: Callable[..., Following]) -> Callable[..., Following]:
    """As if all slots in flight were asked for, whoever has ended."""

    class Uncounted(dict[int, np.ndarray]):
        def __len__(self) -> int:
            return 0

    def wrong(*arguments: Any) -> Following:
        found = after(*arguments)
        return replace(found, tokens=Uncounted(found.tokens))

    return wrong


# -- faults that only plans show which the loop doesn't make ---------------------------------------------------------


def _moved_twice(patch: pytest.MonkeyPatch) -> None:
    """What a discarded step has moved is taken for rows that are still to be moved."""
    right = TrtExecutor._discard

    def wrong(self: TrtExecutor) -> None:
        right(self)
        self._delivered = self._launched

    patch.setattr(TrtExecutor, "_discard", wrong)


def _chunks_share_a_place(patch: pytest.MonkeyPatch) -> None:
    right = TrtExecutor._prefill

    def wrong(self: TrtExecutor, rows: SlotRows, length: int) -> SlotResult | Exception:
        self._chunks = self._chunks[:1] * SLOTS
        return right(self, rows, length)

    patch.setattr(TrtExecutor, "_prefill", wrong)


def _everything_verifies(patch: pytest.MonkeyPatch) -> None:
    """The step after a prefill chunk is started, too."""
    patch.setattr(trt, "goes_on", lambda plan: plan.follow if plan.active and not plan.active[0].prefills else None)


_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "rows are moved twice": _moved_twice,
    "chunks share a place": _chunks_share_a_place,
    "everything is followed": _everything_verifies,
    "every step in flight is the one that was asked for": lambda patch: patch.setattr(
        Following, "has_results_of", lambda self, decoding, lengths: len(decoding) > 0
    ),
    "rows that rest aren't moved": lambda patch: patch.setattr(DeviceInputs, "rest", _rests_in_place(DeviceInputs.rest)),
}


def _rests_in_place(right: Callable[..., None]) -> Callable[..., None]:
    return lambda self, length, moves, index: right(self, length, (), index)


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_is_caught(engine_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    mine = load_fake(engine_bundle, monkeypatch, slots=SLOTS).executor
    theirs = load(tiny_bundle, slots=SLOTS, threads=1, variant="standard").executor
    _FAULTS[fault](monkeypatch)
    for seed in range(20):
        try:
            _run_any_plans(mine, theirs, seed)
        except (AssertionError, IndexError, KeyError, DeployError):
            return
    raise AssertionError("nobody noticed")
