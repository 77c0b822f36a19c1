"""The scheduler: who gets a slot, who steps, and whose prompt goes on. Pure: it knows of no engine and no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence's part of a step. ``prompt_rows``: tokens of its prompt that it computes; 0 decodes."""

    sequence: Sequence
    prompt_rows: int = 0


@dataclass(slots=True)
class Scheduler:
    """Sequences that wait for a slot and those that hold one, each in order of arrival.

    Every decoding sequence takes part in every step. Of the prompts that are under way, the first by priority goes on by one
    chunk, in the same step: nobody waits for more than one chunk of somebody else's prompt.
    """

    prefill_chunk: int
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)

    def next_waiting(self) -> Sequence:
        """Take the next sequence from the queue: the first to come of the smallest priority number."""
        sequence = min(self.waiting, key=lambda sequence: sequence.priority)
        self.waiting.remove(sequence)
        return sequence

    def turns(self) -> list[Turn]:
        """The sequences of the next step; none when nothing runs."""
        turns = [Turn(sequence) for sequence in self.running if sequence.state == "decode"]
        prompts = [sequence for sequence in self.running if sequence.state == "prefill"]
        if prompts:
            first = min(prompts, key=lambda sequence: sequence.priority)
            turns.append(Turn(first, min(self.prefill_chunk, first.prompt_length - first.computed)))
        return turns
