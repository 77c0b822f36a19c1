"""The loop step by step: what a step emits and moves, who takes part in it, and how one request ends alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.errors import NumericsError, StepError
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.tree import ROOT_ONLY
from support.fake_executor import FakeSession, fake_session, plain_reference
from support.tiny import HEADS
from support.trees import WIDE


def _submit(session: FakeSession, prompt: list[int], **options: Any) -> Handle:
    return session.submit(Request(token_ids=prompt, **{"max_new_tokens": 40, "drafting": WIDE, **options}))


def _tick(session: FakeSession, times: int = 1) -> None:
    for _ in range(times):
        assert session.loop.tick()


def test_a_step_emits_one_more_than_it_accepts_and_the_length_follows() -> None:
    session = fake_session()
    sequence = _submit(session, [1, 2, 3]).sequence
    _tick(session)
    assert sequence.emitted == session.language.greedy([1, 2, 3], 1)
    length = int(session.slots.lengths[sequence.slot])
    assert length == 3
    while sequence.finish_reason is None:
        before, count = dict(sequence.stats.accepted), len(sequence.emitted)
        _tick(session)
        (accepted,) = (count for count, steps in sequence.stats.accepted.items() if steps != before.get(count, 0))
        assert 0 <= accepted <= WIDE.depth
        assert session.slots.lengths[sequence.slot] + len(session.slots.moves[sequence.slot]) >= length + 1
        assert len(sequence.emitted) - count == 1 + accepted or sequence.finish_reason == "length"
        length += 1 + accepted
        assert sequence.finish_reason == "length" or session.slots.lengths[sequence.slot] == length
    assert len(sequence.emitted) == 40


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(mode="sample", seed=3)], ids=["in-graph", "host"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_part_of_a_step_that_fails_moves_no_length_and_ends_alone(params: SamplingParams, padded: bool) -> None:
    """The third request's prefill fails beside two that decode: their text is what it is alone."""
    session = fake_session(3, padded=padded)
    one, two = _submit(session, [1, 2, 3], params=params), _submit(session, [4] * 20)
    _tick(session, 6)
    three = _submit(session, [5] * 20)
    _tick(session)
    lengths = session.slots.lengths.copy()
    session.executor.fail_at = session.executor.calls + 2
    _tick(session)
    assert session.slots.lengths[three.sequence.slot] == lengths[three.sequence.slot]
    with pytest.raises(StepError, match="the engine failed") as caught:
        three.result()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert three.wait().finish_reason == "error"
    assert one.result().token_ids == plain_reference(session.language, params, [1, 2, 3], 40)
    assert two.result().token_ids == session.language.greedy([4] * 20, 40)
    assert session.slots.free == 3


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(mode="sample", seed=0)], ids=["in-graph", "host"])
@pytest.mark.parametrize("speculative", [False, True])
def test_a_request_that_sees_nan_ends_alone(params: SamplingParams, speculative: bool) -> None:
    session = fake_session(2)
    drafting = WIDE if speculative else ROOT_ONLY
    expected = plain_reference(session.language, params, [4, 5], 12)
    good = _submit(session, [1, 2, 3], drafting=drafting)
    bad = _submit(session, [4, 5], params=params, drafting=drafting)
    healthy = {1, 2, 3, 4, 5, *session.language.greedy([1, 2, 3], 40)}
    session.executor.nan = frozenset({next(token for token in expected[3:] if token not in healthy)})
    with pytest.raises(NumericsError):
        bad.result()
    failed = bad.wait()
    assert failed.finish_reason == "error" and isinstance(failed.error, NumericsError)
    assert failed.token_ids == expected[: len(failed.token_ids)] and len(failed.token_ids) > 1
    assert good.result().token_ids == session.language.greedy([1, 2, 3], 40)
    assert session.slots.free == 2


def test_a_prompt_that_sees_nan_ends_at_its_chunk() -> None:
    session = fake_session(prefill_chunk=4)
    session.executor.nan = frozenset({7})
    with pytest.raises(NumericsError):
        session.generate(token_ids=[1, 2, 3, 7, 5, 6, 8, 9], max_new_tokens=5)
    assert session.executor.calls == 1


def test_prompts_go_on_a_chunk_at_a_time_between_the_steps_of_others() -> None:
    session = fake_session(3, prefill_chunk=8)
    one = _submit(session, [1, 2, 3], drafting=ROOT_ONLY)
    _tick(session)
    long, other = _submit(session, [4] * 60, max_new_tokens=5), _submit(session, [6] * 30, max_new_tokens=5)
    emitted = []
    while not (long.done and other.done):
        before = len(one.sequence.emitted)
        _tick(session)
        plan = session.executor.plans[-1]
        assert sum(rows.count for rows in plan.active if rows.forced > 1) <= 8
        emitted.append(len(one.sequence.emitted) - before)
        held = [s for s in (long.sequence, other.sequence) if s.state == "prefill"]
        assert all(session.slots.lengths[s.slot] == s.computed for s in held)
    assert emitted[:10] == [1] * 10, "a step of the first request for every chunk"
    assert long.result().token_ids == session.language.greedy([4] * 60, 5)
    assert other.result().token_ids == session.language.greedy([6] * 30, 5)
    assert one.result().token_ids == session.language.greedy([1, 2, 3], 40)


def test_padding_of_slots_that_rest_lies_behind_what_they_keep() -> None:
    """A slot in the middle of its prompt, and one that was released, keep their rows while others step."""
    session = fake_session(3, prefill_chunk=4, padded=True)
    session.generate(token_ids=[9, 9, 9, 8], max_new_tokens=6, tree=WIDE)
    kept = int(session.slots.lengths[0])
    assert kept > 4
    stays = session.slots.acquire(SimpleNamespace(slot=-1))  # nobody steps on the released slot
    session.slots.lengths[stays] = kept
    before = session.executor._tokens[stays, : HEADS + kept].copy()
    one, long = _submit(session, [1, 2, 3]), _submit(session, [4] * 20, max_new_tokens=3)
    assert long.result().token_ids == session.language.greedy([4] * 20, 3)
    assert one.result().token_ids == session.language.greedy([1, 2, 3], 40)
    assert np.array_equal(session.executor._tokens[stays, : HEADS + kept], before)


def test_a_step_holds_the_active_slots_alone() -> None:
    session = fake_session(4)
    session.generate(token_ids=[1, 2], max_new_tokens=10)
    assert all(len(plan.active) == 1 for plan in session.executor.plans)


def test_priorities_are_served_first_and_deadlines_end_requests() -> None:
    session = fake_session(1)
    first = _submit(session, [1], max_new_tokens=5)
    _tick(session)
    late, urgent = _submit(session, [2], max_new_tokens=5, priority=1), _submit(session, [3], max_new_tokens=5)
    too_late = _submit(session, [4], deadline=1e-9)
    assert urgent.result().finish_reason == "length"
    assert first.done and not late.done
    assert late.result().token_ids == session.language.greedy([2], 5)
    assert (too_late.result().finish_reason, too_late.result().token_ids) == ("cancelled", [])


def test_hidden_states_are_those_behind_every_emitted_token() -> None:
    session = fake_session()
    for params in (SamplingParams(), SamplingParams(mode="sample", temperature=0.3, seed=1)):
        for tree in (ROOT_ONLY, WIDE):
            generation = session.generate(token_ids=[1, 2, 3], max_new_tokens=33, keep_hidden=True, tree=tree, params=params)
            assert generation.hidden is not None and generation.hidden.shape == (33, 64)
            context = [1, 2, 3]
            for state, token in zip(generation.hidden[:, 0], generation.token_ids, strict=True):
                assert state == session.language.state(context)
                context.append(token)
