"""The scheduler: who gets a slot, who steps, and whose prompt goes on. Pure: it knows of no engine and no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence's part of a step. ``prompt_rows``: tokens of its prompt that it computes; 0 decodes."""

    sequence: Sequence
    prompt_rows: int = 0


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Chooses among sequences in order of arrival.

    Every decoding sequence takes part in every step. Of the prompts that are under way, the first by priority goes on by one
    chunk, in the same step: nobody waits for more than one chunk of somebody else's prompt.
    """

    prefill_chunk: int

    def next_waiting(self, sequences: Iterable[Sequence]) -> Sequence | None:
        """The sequence that gets the next slot: of those that wait, the first to come of the smallest priority number."""
        waiting = [sequence for sequence in sequences if sequence.state == "waiting"]
        return min(waiting, key=lambda sequence: sequence.priority, default=None)

    def turns(self, sequences: Iterable[Sequence]) -> list[Turn]:
        """The sequences of the next step; none when nothing runs."""
        running = [sequence for sequence in sequences if sequence.state in ("prefill", "decode")]
        turns = [Turn(sequence) for sequence in running if sequence.state == "decode"]
        prompts = [sequence for sequence in running if sequence.state == "prefill"]
        if prompts:
            first = min(prompts, key=lambda sequence: sequence.priority)
            turns.append(Turn(first, min(self.prefill_chunk, first.prompt_length - first.computed)))
        return turns
