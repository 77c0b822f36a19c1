"""The slot pool: who may use which part of the caches, and how far each part is filled."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..errors import SlotError


class Holder(Protocol):
    """Whoever holds a slot."""

    slot: int
    """The slot that it holds, or held last."""


class SlotPool:
    """Owns the committed length of every slot, and the accepted rows that the next step moves into place.

    A slot belongs to at most one holder. Its rows [0, length) stay after its release, until the slot is taken again: padding
    is written behind them.

    Invariants: free + held = ``slots``; 0 ≤ length ≤ ``capacity``; a length only grows while the slot is held.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.lengths = np.zeros(slots, np.int64)
        self._moves: list[tuple[int, ...]] = [()] * slots
        self._holders: list[Holder | None] = [None] * slots

    @property
    def free(self) -> int:
        """Number of slots that nobody holds."""
        return self._holders.count(None)

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        """For each slot, the accepted rows that the next step copies to the end of the committed ones."""
        return tuple(self._moves)

    def check_free(self) -> None:
        """Refuse to wait for a slot that nobody will give back.

        Raises:
            SlotError: all slots are held.
        """
        if not self.free:
            raise SlotError(f"all {self.slots} slots are in use", hint="finish or close a generation, or load with more slots")

    def acquire(self, holder: Holder) -> int:
        """Let ``holder`` have the lowest free slot, empty. Returns the slot.

        Raises:
            SlotError: all slots are held.
        """
        self.check_free()
        slot = self._holders.index(None)  # held slots stay close together: padded steps cover those from the first to the last
        self.lengths[slot] = 0
        holder.slot, self._holders[slot] = slot, holder  # one line: an interrupt must not come between
        return slot

    def holds(self, holder: Holder) -> bool:
        """Whether ``holder`` holds its slot now."""
        return holder.slot >= 0 and self._holders[holder.slot] is holder

    def release(self, holder: Holder) -> None:
        """Take the slot of ``holder`` back. It keeps the rows that are in place."""
        assert self.holds(holder), f"slot {holder.slot} is not its holder's"
        slot, moves = holder.slot, len(self._moves[holder.slot])
        self._moves[slot] = ()
        self.lengths[slot] -= moves
        self._holders[slot] = None

    def moved(self) -> None:
        """All rows are in place: a step moved them."""
        self._moves = [()] * self.slots

    def advance(self, slot: int, tokens: int, moves: tuple[int, ...] = ()) -> None:
        """Commit ``tokens`` more rows of a held slot, ``moves`` among them, which lie elsewhere until the next step."""
        assert self._holders[slot] is not None and tokens >= 0
        assert self.lengths[slot] + tokens <= self.capacity, "the loop let a sequence outgrow its slot"
        self.lengths[slot] += tokens
        self._moves[slot] = moves
