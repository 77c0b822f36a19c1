"""The slot pool: who may use which part of the caches, and how far each part is filled."""

from __future__ import annotations

import numpy as np

from ..errors import SlotError


class SlotPool:
    """Owns the committed length of every slot; a slot belongs to at most one sequence.

    Invariants: free + held = ``slots``; 0 ≤ length ≤ ``capacity``; a length only grows, by whole steps, while held.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.lengths = np.zeros(slots, np.int64)
        self._free = list(range(slots - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def acquire(self) -> int:
        """Hold an empty slot.

        Raises:
            SlotError: all slots are held.
        """
        if not self._free:
            raise SlotError(f"all {self.slots} slots are in use", hint="finish or close a generation, or load with more slots")
        slot = self._free.pop()
        self._held.add(slot)
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a held slot back; its rows need no clearing, the mask hides them."""
        assert slot in self._held, f"slot {slot} is not held"
        self._held.remove(slot)
        self._free.append(slot)
        self.lengths[slot] = 0

    def advance(self, slot: int, tokens: int) -> None:
        """Commit ``tokens`` more rows of a held slot."""
        assert slot in self._held and tokens >= 0
        assert self.lengths[slot] + tokens <= self.capacity, "the loop let a sequence outgrow its slot"
        self.lengths[slot] += tokens
