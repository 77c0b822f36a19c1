"""The slot pool: who may use which part of the caches, how far each part is filled, and which texts free slots still hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..errors import SlotError

LEAST = 32
"""Tokens from which a prefix is kept and reused: fewer take one short chunk."""


class Holder(Protocol):
    """Whoever holds a slot."""

    slot: int
    """The slot that it holds, or held last."""


@dataclass(frozen=True, slots=True)
class Place:
    """A free slot for a sequence. Its first ``rows`` rows are the sequence's, once they are copied from the slot ``source``."""

    slot: int
    source: int
    rows: int = 0


@dataclass(slots=True)
class PrefixStats:
    """Statistics of a session's prefix cache.

    ``requests``: those that got a slot. ``hits``: those of them that found the beginning of their prompt. ``prompt_tokens``: of
    all of them. ``cached_tokens``: prompt tokens that were not computed again.
    """

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a request."""
        self.requests += 1
        self.hits += cached_tokens > 0
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens


@dataclass(frozen=True, slots=True)
class _Resident:
    """The text that a free slot holds: ``tokens`` int64 [n] are its rows [0, n). ``used``: the pool's time of its last use."""

    salt: str
    tokens: np.ndarray
    used: int


class SlotPool:
    """Owns the committed length of every slot, and the accepted rows that the next step moves into place.

    A slot belongs to at most one holder. Its rows [0, length) stay after its release, until the slot is taken again: padding
    is written behind them. A holder that says which tokens they are leaves them to whoever begins with the same tokens.

    Invariants: free + held = ``slots``; 0 ≤ length ≤ ``capacity``; a length only grows while the slot is held; a held slot, and
    one that somebody is about to write to, is nobody's source.
    """

    def __init__(self, slots: int, capacity: int, *, keep: bool = True, copies: bool = False, together: bool = False) -> None:
        """``keep``: whether texts of free slots are reused. ``copies``: whether the engine can copy rows between slots.

        ``together``: a step covers the slots from the first to the last held one, so they should be close to each other.
        """
        self.slots = slots
        self.capacity = capacity
        self.lengths = np.zeros(slots, np.int64)
        self.prefix_stats = PrefixStats()
        self._keep, self._copies, self._together = keep, copies, together
        self._moves: list[tuple[int, ...]] = [()] * slots
        self._holders: list[Holder | None] = [None] * slots
        self._residents: list[_Resident | None] = [None] * slots
        self._time = 0  # uses of texts so far

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

    # -- which slot ------------------------------------------------------------------------------------------------

    def place(self, tokens: Sequence[int], salt: str = "") -> Place:
        """Choose a free slot for a prompt, and the rows to begin with: the longest prefix that a free slot of this salt holds.

        The prompt's last token is always computed again, because its outputs are needed. Where the found text goes on otherwise,
        it is copied instead of cut, if a text that is worth less can make room.

        Raises:
            SlotError: all slots are held.
        """
        self.check_free()
        free = [slot for slot, holder in enumerate(self._holders) if holder is None]
        spare = min(free, key=lambda slot: (self._span(slot), self._value(slot), slot))
        prompt = np.array(tokens[:-1], np.int64)
        source, rows = spare, 0
        for slot in sorted(free, key=self._used):  # of equally long prefixes, that of the oldest text
            if (found := self._shared(slot, prompt, salt)) > rows:
                source, rows = slot, found
        if rows < LEAST:
            return Place(spare, spare)
        resident = self._residents[source]
        assert resident is not None
        rest = len(resident.tokens) - rows
        cut = self._value(source) * rest / len(resident.tokens)
        return Place(spare if self._copies and rest >= LEAST and self._value(spare) < cut else source, source, rows)

    def _shared(self, slot: int, prompt: np.ndarray, salt: str) -> int:
        """Tokens that ``prompt`` and the slot's text have in common from the first one on."""
        resident = self._residents[slot]
        if resident is None or resident.salt != salt:
            return 0
        differs = resident.tokens[: len(prompt)] != prompt[: len(resident.tokens)]
        return int(differs.argmax()) if differs.any() else len(differs)

    def _value(self, slot: int) -> float:
        """What a slot's text is worth: its tokens, divided by the uses of other texts since its own."""
        resident = self._residents[slot]
        return 0.0 if resident is None else len(resident.tokens) / (1 + self._time - resident.used)

    def _used(self, slot: int) -> int:
        resident = self._residents[slot]
        return 0 if resident is None else resident.used

    def _span(self, slot: int) -> int:
        """Slots that a step covers once this one is held, where that matters."""
        if not self._together:
            return 0
        held = [slot, *(other for other, holder in enumerate(self._holders) if holder is not None)]
        return max(held) - min(held)

    # -- taking and giving back ------------------------------------------------------------------------------------

    def forget(self, slot: int) -> None:
        """Let nobody begin with the slot's text: its rows are about to change."""
        self._residents[slot] = None

    def acquire(self, holder: Holder, place: Place | None = None) -> int:
        """Let ``holder`` have a free slot: that of ``place``, with its rows, or one that is empty. Returns the slot.

        Raises:
            SlotError: all slots are held.
        """
        place = place or self.place(())
        slot = place.slot
        assert self._holders[slot] is None
        source = self._residents[place.source]
        if place.rows and source is not None:
            self._time += 1
            self._residents[place.source] = replace(source, used=self._time)
        self.forget(slot)  # first: an interrupt may come between any two lines
        self.lengths[slot] = place.rows
        holder.slot, self._holders[slot] = slot, holder  # one line: an interrupt must not come between
        return slot

    def holds(self, holder: Holder) -> bool:
        """Whether ``holder`` holds its slot now."""
        return holder.slot >= 0 and self._holders[holder.slot] is holder

    def release(self, holder: Holder, tokens: Sequence[int] = (), salt: str = "") -> None:
        """Take the slot of ``holder`` back. It keeps the rows that are in place.

        ``tokens``: those of its rows, from the first one on, for others of the same ``salt``; none if they are not to be used.
        """
        assert self.holds(holder), f"slot {holder.slot} is not its holder's"
        slot = holder.slot
        rows = self.lengths[slot] - len(self._moves[slot])
        self.lengths[slot], self._moves[slot] = rows, ()  # one line: rows that aren't in place must not seem to be
        kept = np.array(tokens[: int(rows)], np.int64)
        keep = self._keep and len(kept) >= LEAST
        self._time += keep
        self._residents[slot] = _Resident(salt, kept, self._time) if keep else None
        self._holders[slot] = None

    # -- steps -----------------------------------------------------------------------------------------------------

    def moved(self) -> None:
        """All rows are in place: a step moved them."""
        self._moves = [()] * self.slots

    def advance(self, slot: int, tokens: int, moves: tuple[int, ...] = ()) -> None:
        """Commit ``tokens`` more rows of a held slot, ``moves`` among them, which lie elsewhere until the next step."""
        assert self._holders[slot] is not None and tokens >= 0
        assert self.lengths[slot] + tokens <= self.capacity, "the loop let a sequence outgrow its slot"
        self.lengths[slot] += tokens
        self._moves[slot] = moves
