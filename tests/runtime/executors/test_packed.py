"""Several slots in one call of the CPU: every number is the one that a slot has alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("onnxruntime")

import onnxruntime

from medusa_deploy.runtime import Request, SamplingParams, load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.one_slot import plan_of_one, prefill_rows
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, Wanted
from medusa_deploy.runtime.session import Session
from medusa_deploy.runtime.tree import ROOT_ONLY, Shape
from support.tiny import VOCAB

SLOTS = 5


@pytest.fixture(scope="module")
def packed(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, slots=SLOTS, threads=1)


shapes = st.lists(st.integers(0, 30), max_size=6).map(
    lambda picks: Shape.of((-1, *sorted(pick % (row + 1) for row, pick in enumerate(picks))))
)


@st.composite
def slot_rows(draw: st.DrawFn, slot: int) -> SlotRows:
    wanted = Wanted(*(draw(st.booleans()) for _ in range(3)))
    if draw(st.booleans()):
        tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=16))
        return prefill_rows(slot, np.array(tokens), wanted)
    shape = draw(shapes)
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=shape.rows, max_size=shape.rows))
    return SlotRows(slot, np.array(tokens), shape, 1, wanted)


@settings(max_examples=40)
@given(data=st.data())
def test_a_packed_step_gives_each_slot_what_it_gets_alone(packed: Session, alone: Session, data: st.DataObject) -> None:
    """Three steps of random rows in random slots behind random prompts; the solo executor gets the same, slot by slot."""
    lengths = [data.draw(st.integers(1, 80), label="length") for _ in range(SLOTS)]
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    prompts = [rng.integers(0, VOCAB, length) for length in lengths]
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 16):
            kept = [start if other == slot else 0 for other in range(SLOTS)]
            packed.executor.run(plan_of_one(prefill_rows(slot, prompt[start : start + 16]), kept))
    for _ in range(3):
        active = data.draw(st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=2, max_size=SLOTS), label="active")
        rows = tuple(data.draw(slot_rows(slot)) for slot in active)
        found = packed.executor.run(StepPlan(rows, tuple(lengths), ((),) * SLOTS)).slots
        for each, result in zip(rows, found, strict=True):
            expected = run_alone(alone, prompts[each.slot], each)
            assert isinstance(result, SlotResult)
            assert (result.last_row, result.next_token, result.finite) == (expected.last_row, expected.next_token, True)
            for name in ("candidates", "log_probs", "logits", "hidden"):
                mine, theirs = getattr(result, name), getattr(expected, name)
                assert (mine is None) == (theirs is None)
                if mine is not None and name in ("logits", "hidden"):
                    np.testing.assert_array_equal(mine, theirs)


def run_alone(session: Session, prompt: np.ndarray, rows: SlotRows) -> SlotResult:
    for start in range(0, len(prompt), 16):
        session.executor.run(plan_of_one(prefill_rows(0, prompt[start : start + 16]), [start]))
    mine = SlotRows(0, rows.tokens, rows.shape, rows.forced, rows.wanted)
    (result,) = session.executor.run(plan_of_one(mine, [len(prompt)])).slots
    assert isinstance(result, SlotResult)
    return result


sampled = st.builds(
    SamplingParams,
    mode=st.just("sample"),
    temperature=st.floats(0.2, 1.5),
    top_p=st.sampled_from([0.8, 1.0]),
    seed=st.integers(0, 9),
)
requests = st.builds(
    Request,
    token_ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60),
    max_new_tokens=st.integers(1, 30),
    params=st.one_of(st.just(SamplingParams()), sampled),
    rows=st.sampled_from([None, 1, 4, 9]),
    priority=st.integers(0, 2),
)


@settings(max_examples=25)
@given(asked=st.lists(requests, min_size=2, max_size=9), cancelled=st.sets(st.integers(0, 8)), wait=st.integers(0, 12))
def test_company_changes_no_token(packed: Session, alone: Session, asked: list[Request], cancelled: set[int], wait: int) -> None:
    """Whoever else runs, joins, leaves or is cancelled: a request's tokens are those of its solo run."""
    handles = [packed.submit(request) for request in asked[: len(asked) // 2 + 1]]
    for _ in range(wait):
        packed.loop.tick()
    handles += [packed.submit(request) for request in asked[len(handles) :]]
    packed.loop.tick()
    for index in cancelled & set(range(len(handles))):
        handles[index].cancel()
    for index, (request, handle) in enumerate(zip(asked, handles, strict=True)):
        found = handle.wait()
        expected = alone.submit(request).result().token_ids
        if index in cancelled:
            expected = expected[: len(found.token_ids)]
        assert found.token_ids == expected
    assert packed.slots.free == SLOTS


def test_slots_share_calls_of_the_smallest_graph_that_has_places(packed: Session, calls: list[int]) -> None:
    for count, places in ((1, 1), (2, 2), (3, 4), (5, 8)):
        calls.clear()
        asked = [Request(token_ids=[token + 1], max_new_tokens=6, rows=3, lookup=False) for token in range(count)]
        for _, generation in packed.generate_many(asked):
            assert len(generation.token_ids) == 6
        assert max(calls) == places
        assert len(calls) <= 6 + 2 * count, "a step of several slots is one call"


def test_plain_steps_of_neighbours_are_one_call_of_the_graph_for_one_slot(
    packed: Session, alone: Session, calls: list[int]
) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, length) for length in (3, 70, 1, 31, 64)]
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 16):
            kept = [start if other == slot else 0 for other in range(SLOTS)]
            packed.executor.run(plan_of_one(prefill_rows(slot, prompt[start : start + 16]), kept))
    lengths = tuple(len(prompt) for prompt in prompts)
    for active, count in (((1, 2, 3), 1), ((4, 3, 2, 1, 0), 1), ((0, 2), 2)):
        rows = tuple(SlotRows(slot, np.array([slot + 9]), ROOT_ONLY, 1, Wanted(slot == 2, True, True)) for slot in active)
        calls.clear()
        found = packed.executor.run(StepPlan(rows, lengths, ((),) * SLOTS)).slots
        assert calls == [count]
        for each, result in zip(rows, found, strict=True):
            expected = run_alone(alone, prompts[each.slot], each)
            assert isinstance(result, SlotResult)
            assert result.next_token == expected.next_token
            np.testing.assert_array_equal(result.logits, expected.logits)
            np.testing.assert_array_equal(result.hidden, expected.hidden)
            assert (result.candidates is None) == (each.slot != 2)


def test_a_packed_call_that_fails_is_made_slot_by_slot(
    packed: Session, alone: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = onnxruntime.InferenceSession.run_with_iobinding

    def failing(self: onnxruntime.InferenceSession, *arguments: object) -> None:
        if any(value.name == step_io.ROWS_OF_SLOT for value in self.get_inputs()):
            raise RuntimeError("out of memory")
        run(self, *arguments)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", failing)
    asked = [Request(token_ids=[token, 3], max_new_tokens=8, rows=4) for token in range(4)]
    with caplog.at_level(logging.WARNING, "medusa_deploy"):
        found = dict(packed.generate_many(asked))
    assert "out of memory" in caplog.text
    for index, request in enumerate(asked):
        assert found[index].token_ids == alone.submit(request).result().token_ids
