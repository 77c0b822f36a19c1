"""Any plans, one after another: the TensorRT executor returns what the CPU's returns, whether or not a step was in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, load
from medusa_deploy.runtime.executors.executor import Executor
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, Wanted
from medusa_deploy.runtime.executors.tensorrt import executor as trt
from medusa_deploy.runtime.tree import Tree, chain
from support.fake_cuda import FakeRuntime
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


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_plans_give_the_cpus_results(executors: tuple[Executor, Executor], seed: int) -> None:
    """``follow`` is a guess: the next plan may be another one, and a sequence may keep less than was accepted."""
    mine, theirs = executors
    rng, caller = np.random.default_rng(seed), Caller(mine)
    tree, busy = WIDE, list(range(SLOTS))
    for _ in range(60):
        if rng.integers(0, 8) == 0:
            tree = TREES[rng.integers(0, len(TREES))]
            busy = [slot for slot in range(SLOTS) if rng.integers(0, 3)]
        active = [rows for slot in busy if (rows := _rows(caller, rng, slot, tree)) is not None]
        rng.shuffle(active)  # type: ignore[arg-type]
        plan = caller.plan(active, tree if rng.integers(0, 5) else None)
        found, expected = (succeeded(executor.run(plan)) for executor in executors)
        _same(found, expected)
        caller.commit(plan, found, most=0 if rng.integers(0, 20) == 0 else None)
    assert theirs.abilities.slots == SLOTS
