"""Buffers that executors keep from step to step: the most recent ones, up to a limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import strategies as st

from medusa_deploy.runtime import SamplingParams, Session
from medusa_deploy.runtime.backends import ort_model
from medusa_deploy.runtime.executors import step_arrays
from medusa_deploy.runtime.executors.ort import OrtExecutor
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor
from medusa_deploy.runtime.executors.step_arrays import KEPT_BYTES, Recent, StepOutputs
from medusa_deploy.runtime.executors.step_plan import NO_OUTPUTS, Wanted
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.tree import Shape
from support.plans import prefill, verify
from support.tiny import VOCAB

_sizes = st.tuples(st.integers(1, 500), st.integers(1, 8), st.integers(1, 64))  # capacity, heads, most rows of a step


# -- what is kept --------------------------------------------------------------------------------------------------


class Block:
    """Something that takes ``nbytes``."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_most_recent_buffers_are_kept_up_to_the_limit() -> None:
    recent: Recent[Block] = Recent(100)
    first, second = recent.get("a", lambda: Block(40)), recent.get("b", lambda: Block(40))
    assert recent.get("a", lambda: Block(1)) is first
    recent.get("c", lambda: Block(40))  # b was used longest ago
    assert recent.nbytes == 80
    assert recent.get("a", lambda: Block(1)) is first
    assert recent.get("b", lambda: Block(20)) is not second
    recent.get("d", lambda: Block(101))
    assert recent.nbytes == 0, "what is larger than the limit is made anew each time"


def test_buffers_that_grow_while_in_use_are_counted_when_others_are_asked_for() -> None:
    recent: Recent[Block] = Recent(100)
    recent.get("a", lambda: Block(30)).nbytes = 45
    recent.get("b", lambda: Block(30)).nbytes = 45
    assert recent.nbytes == 45 + 30
    recent.get("c", lambda: Block(30)).nbytes = 45  # 120 with b's growth: a goes, with all that was counted for it
    assert recent.nbytes == 45 + 30
    recent.get("c", lambda: Block(0))
    assert recent.nbytes == 45 + 45
    recent.get("c", lambda: Block(0)).nbytes = 70
    assert recent.get("b", lambda: Block(20)).nbytes == 20, "b had to make room for c"
    assert recent.nbytes == 70 + 20


@pytest.mark.parametrize("batched", [False, True], ids=["a call a slot", "one call"])
def test_buffers_of_all_sizes_with_logits_of_a_large_vocabulary_are_bounded(
    monkeypatch: pytest.MonkeyPatch, batched: bool
) -> None:
    """8 slots, 152k tokens, steps of 1 to 64 rows, whose outputs are made without memory."""
    zeros = lambda shape, dtype: np.broadcast_to(np.zeros((), dtype), shape)  # noqa: E731
    monkeypatch.setattr(step_arrays, "np", SimpleNamespace(zeros=zeros, int64=np.int64, float32=np.float32))
    assert KEPT_BYTES <= 256 << 20
    recent: Recent[StepOutputs] = Recent()
    made = 0
    for wanted in (Wanted(logits=True, hidden=True), Wanted(heads=True)):
        for rows in range(1, 65):
            for slot in range(8):
                slots = 1 + slot if batched else 1

                def make(rows: int = rows, slots: int = slots, wanted: Wanted = wanted) -> StepOutputs:
                    nonlocal made
                    outputs = StepOutputs.allocate(slots, rows, 4, 10, 1536, 152_000, "float32", wanted)
                    made += outputs.nbytes
                    return outputs

                found = recent.get((slot, rows, wanted), make)
                assert len(found.last_row) == slots
                assert sum(kept.nbytes for kept in recent._kept.values()) == recent.nbytes <= KEPT_BYTES
    assert made > 40 * KEPT_BYTES


@pytest.mark.parametrize("name", ["cpu", "standard", "device"])
def test_an_executor_keeps_no_more_than_the_limit_and_computes_the_same(tiny_bundle: Path, name: str) -> None:
    """Masks grow with the text; those of the CPU's graph make up most of what is kept here."""
    model = ort_model(open_bundle(tiny_bundle), 2, "cpu" if name == "cpu" else "standard")
    make = (lambda: OrtDeviceExecutor(model, "cpu", threads=1)) if name == "device" else lambda: OrtExecutor(model, threads=1)
    limited, free = make(), make()
    limit, rng = 60_000, np.random.default_rng(2)
    limited._bound = Recent(limit)
    for slot in range(2):
        for executor in (limited, free):
            prefill(executor, slot, np.arange(20))
    for length in (20, 100, 240):
        for rows in range(1, 17):
            for slot in range(2):
                tokens = rng.integers(0, VOCAB, rows)
                wanted = Wanted(logits=True) if rows % 2 else NO_OUTPUTS
                one, other = (verify(each, slot, Shape.chain(rows), tokens, length, (), wanted) for each in (limited, free))
                assert (one.last_row, one.next_token) == (other.last_row, other.next_token)
                *kept, _newest = limited._bound._kept.values()  # type: ignore[misc]
                assert sum(each.nbytes for each in kept) <= limit, "the newest may have grown since"
    assert free._bound.nbytes > 2 * limit, "the limit was never reached"


def test_the_threads_of_the_heads_do_not_spin_beside_those_of_the_step(tiny_session: Session) -> None:
    """Sampling runs the heads as a session of their own; its threads, waiting busily, doubled the time of each step."""
    tiny_session.generate(token_ids=[5, 6, 7], max_new_tokens=8, params=SamplingParams(mode="sample", seed=1))
    executor = tiny_session.executor
    assert isinstance(executor, OrtExecutor) and executor._heads_session is not None
    options = executor._heads_session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
