"""Prefixes that free slots hold: the pool beside a model of it, and that an answer never depends on what a slot held."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.loop import slots as slots_module
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.loop.slots import SlotPool
from support.fake_executor import fake_session
from support.tiny import VOCAB

# -- the pool beside a model of it ---------------------------------------------------------------------------------

TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


class PrefixMachine(RuleBasedStateMachine):
    """Places, acquires and releases texts of two letters at random, beside plain lists of what each slot holds."""

    @initialize(slots=st.integers(1, 4), copies=st.booleans(), together=st.booleans())
    def start(self, slots: int, copies: bool, together: bool) -> None:
        self.least, slots_module.LEAST = slots_module.LEAST, 2
        self.pool = SlotPool(slots, 20, copies=copies, together=together)
        self.copies = copies
        self.rows: list[list[tuple[str, int]]] = [[] for _ in range(slots)]
        self.known = [False] * slots
        self.held: dict[int, tuple[SimpleNamespace, list[int], str]] = {}

    @precondition(lambda self: self.pool.free)
    @rule(text=TEXTS, salt=st.sampled_from("ab"))
    def take(self, text: list[int], salt: str) -> None:
        place = self.pool.place(text, salt)
        free = [slot for slot in range(self.pool.slots) if slot not in self.held]
        shared = {slot: self.shared(slot, text, salt) for slot in free}
        best = max(shared.values())
        assert place.slot in free and place.rows == (best if best >= 2 else 0) < len(text)
        if place.rows:
            assert shared[place.source] == best
            assert self.copies or place.source == place.slot
        holder = SimpleNamespace(slot=-1)
        if place.source != place.slot:
            self.pool.forget(place.slot)
            self.rows[place.slot] = self.rows[place.source][: place.rows]
        assert self.pool.acquire(holder, place) == place.slot and self.pool.lengths[place.slot] == place.rows
        self.rows[place.slot] = [*self.rows[place.slot][: place.rows], *((salt, token) for token in text[place.rows :])]
        assert self.rows[place.slot] == [(salt, token) for token in text]
        self.pool.advance(place.slot, len(text) - place.rows)
        self.held[place.slot] = (holder, text, salt)
        self.known[place.slot] = False

    def shared(self, slot: int, text: list[int], salt: str) -> int:
        if not self.known[slot]:
            return 0
        count = 0
        for row, token in zip(self.rows[slot], text[:-1], strict=False):
            if row != (salt, token):
                break
            count += 1
        return count

    @precondition(lambda self: self.held)
    @rule(data=st.data(), moves=st.integers(0, 3), tell=st.sampled_from([True, True, False]))
    def give_back(self, data: st.DataObject, moves: int, tell: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        holder, text, salt = self.held.pop(slot)
        self.pool.advance(slot, moves, tuple(range(30, 30 + moves)))
        self.pool.release(holder, [*text, *[9] * moves] if tell else (), salt)
        self.known[slot] = tell and len(text) >= 2
        assert self.pool.lengths[slot] == len(text)

    @invariant()
    def slots_are_free_or_held(self) -> None:
        assert self.pool.free + len(self.held) == self.pool.slots

    def teardown(self) -> None:
        if hasattr(self, "least"):
            slots_module.LEAST = self.least


TestPrefixes = PrefixMachine.TestCase
TestPrefixes.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -- a slot after anything equals a fresh slot ---------------------------------------------------------------------


@pytest.fixture(name="short_prefixes", scope="module")
def _short_prefixes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "LEAST", 3)
        yield


ENDS = ("runs", "cancelled", "failed", "nan", "late")


@given(
    slots=st.integers(1, 3),
    padded=st.booleans(),
    jobs=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), max_size=5),  # blocks: texts share beginnings
            st.integers(1, 6),
            st.integers(1, 30),
            st.sampled_from(["", "", "salt"]),
            st.sampled_from([SamplingParams(), SamplingParams(mode="sample", seed=3)]),
            st.sampled_from([None, 1, 5]),
            st.sampled_from(ENDS),
            st.integers(0, 6),
            st.booleans(),
        ),
        min_size=2,
        max_size=12,
    ),
)
def test_a_slot_after_anything_equals_a_fresh_slot(slots: int, padded: bool, jobs: list[Any], short_prefixes: None) -> None:
    session = fake_session(slots, capacity=96, prefill_chunk=8, padded=padded)
    asked: list[tuple[Handle, list[int]]] = []
    for blocks, tail, new, salt, params, rows, end, ticks, go_on in jobs:
        prompt = [*(16 * block + place for block in blocks for place in range(8)), *range(100, 100 + tail)]
        if go_on and asked and len(before := asked[-1][0].wait().prompt_token_ids + asked[-1][0].wait().token_ids) < 60:
            prompt = [*before, 3, 4]
        if end == "nan":
            prompt = [*prompt, VOCAB - 1]
        options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": new, "params": params}
        expected = fake_session(1, capacity=96, prefill_chunk=8).generate(**options, speculative=False)
        session.executor.nan = frozenset({VOCAB - 1}) if end == "nan" else frozenset()
        asked.append((session.submit(Request(**options, rows=rows, cache_salt=salt)), expected.token_ids))
        session.executor.fail_at = session.executor.calls + 1 + ticks % 3 if end == "failed" else None
        for _ in range(ticks):
            session.loop.tick()
        session.executor.fail_at = None
        if end == "cancelled":
            asked[-1][0].cancel()
        if end in ("nan", "late"):
            for handle, _ in asked:
                handle.wait()
    for handle, tokens in asked:
        found = handle.wait()
        assert found.token_ids == tokens[: len(found.token_ids)]
        assert found.finish_reason != "length" or found.token_ids == tokens
    assert session.slots.free == slots
