"""The slot pool: who may use which part of the caches, and how far each part is filled."""

from __future__ import annotations

import numpy as np

from ..errors import SlotError


class SlotPool:
    """Owns the committed length of every slot, and the accepted rows that the next step moves into place.

    A slot belongs to at most one sequence. Its rows [0, length) stay after its release, until the slot is taken again: padding
    is written behind them.

    Invariants: free + held = ``slots``; 0 ≤ length ≤ ``capacity``; a length only grows while the slot is held.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.lengths = np.zeros(slots, np.int64)
        self._moves: list[tuple[int, ...]] = [()] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Number of slots that nobody holds."""
        return len(self._free)

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        """For each slot, the accepted rows that the next step copies to the end of the committed ones."""
        return tuple(self._moves)

    def acquire(self) -> int:
        """Hold the lowest free slot, empty.

        Raises:
            SlotError: all slots are held.
        """
        if not self._free:
            raise SlotError(f"all {self.slots} slots are in use", hint="finish or close a generation, or load with more slots")
        slot = min(self._free)  # held slots stay close together: padded steps cover the slots from the first to the last one
        self._free.remove(slot)
        self._held.add(slot)
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a held slot back. It keeps the rows that are in place."""
        assert slot in self._held, f"slot {slot} is not held"
        self._held.remove(slot)
        self._free.append(slot)
        self.lengths[slot] -= len(self._moves[slot])
        self._moves[slot] = ()

    def moved(self) -> None:
        """All rows are in place: a step moved them."""
        self._moves = [()] * self.slots

    def advance(self, slot: int, tokens: int, moves: tuple[int, ...] = ()) -> None:
        """Commit ``tokens`` more rows of a held slot, ``moves`` among them, which lie elsewhere until the next step."""
        assert slot in self._held and tokens >= 0
        assert self.lengths[slot] + tokens <= self.capacity, "the loop let a sequence outgrow its slot"
        self.lengths[slot] += tokens
        self._moves[slot] = moves
