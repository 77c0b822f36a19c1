"""The slot pool: who holds what, whatever happens in which order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from medusa_deploy.runtime.errors import SlotError
from medusa_deploy.runtime.loop.slots import SlotPool

SLOTS, CAPACITY = 3, 10


class SlotMachine(RuleBasedStateMachine):
    """Acquire, advance, step and release at random, beside a model of plain dictionaries and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(SLOTS, CAPACITY)
        self.held: dict[int, int] = {}
        self.holders: dict[int, SimpleNamespace] = {}
        self.kept = [0] * SLOTS
        self.moves: list[tuple[int, ...]] = [()] * SLOTS

    @precondition(lambda self: len(self.held) < SLOTS)
    @rule()
    def acquire(self) -> None:
        holder = SimpleNamespace(slot=-1)
        assert not self.pool.holds(holder)
        slot = self.pool.acquire(holder)
        assert holder.slot == slot and self.pool.holds(holder)
        self.holders[slot] = holder
        assert slot == min(set(range(SLOTS)) - set(self.held)), "held slots stay close together"
        assert self.pool.lengths[slot] == 0
        self.held[slot] = 0

    @precondition(lambda self: len(self.held) == SLOTS)
    @rule()
    def acquire_from_a_full_pool(self) -> None:
        with pytest.raises(SlotError, match=f"all {SLOTS} slots"):
            self.pool.acquire(SimpleNamespace(slot=-1))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        tokens = data.draw(st.integers(0, CAPACITY - self.held[slot]))
        moves = tuple(range(50, 50 + data.draw(st.integers(0, tokens))))
        self.pool.advance(slot, tokens, moves)
        self.held[slot] += tokens
        self.moves[slot] = moves

    @rule()
    def step(self) -> None:
        self.pool.moved()
        self.moves = [()] * SLOTS

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def outgrow(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        with pytest.raises(AssertionError):
            self.pool.advance(slot, CAPACITY - self.held[slot] + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        holder = self.holders.pop(slot)
        self.pool.release(holder)
        self.kept[slot] = self.held.pop(slot) - len(self.moves[slot])
        self.moves[slot] = ()
        with pytest.raises(AssertionError):
            self.pool.release(holder)

    @invariant()
    def slots_are_free_or_held(self) -> None:
        assert self.pool.free + len(self.held) == SLOTS

    @invariant()
    def lengths_are_what_was_committed(self) -> None:
        assert np.array_equal(self.pool.lengths, [self.held.get(slot, self.kept[slot]) for slot in range(SLOTS)])
        assert self.pool.moves == tuple(self.moves)


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
