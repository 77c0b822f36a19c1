"""Running ahead: the next step is under way while the host still reads this one."""

from __future__ import annotations

from collections.abc import Callable

from ..drafting.draft import Draft, FixedTree
from ..executors.executor import AheadExecutor, StepBuffers, Wanted
from ..tree import Tree
from .sequence import Sequence
from .slots import SlotPool

WANTED = Wanted(heads=True)


class RunAhead:
    """Launches steps that follow from the device's own state, for as long as the same sequences ask for them.

    A step is launched before it is known whether it is needed: at the end of a sequence, one is discarded. So that sequences
    that take turns don't discard every second one, the first step of a group is the host's own.
    """

    def __init__(self, executor: AheadExecutor, slots: SlotPool, margin: int) -> None:
        self._executor, self._slots, self._margin = executor, slots, margin
        self._group: list[Sequence] = []
        self.in_flight = 0

    def suits(self, sequences: list[Sequence]) -> bool:
        """Whether these sequences stepped last and the device can go on alone: greedy, on one fixed tree, nothing kept."""
        again = len(sequences) == len(self._group) and all(a is b for a, b in zip(sequences, self._group, strict=True))
        self._group = list(sequences)
        first = sequences[0].drafter
        return again and all(
            sequence.params.plain_argmax
            and not sequence.keep_hidden
            and isinstance(sequence.drafter, FixedTree)
            and sequence.drafter == first
            for sequence in sequences
        )

    def step(self, sequences: list[Sequence], fill: Callable[[Wanted], StepBuffers]) -> StepBuffers:
        """Results of the sequences' next step. ``fill`` says what it is, where none is in flight."""
        tree = _tree(sequences[0])
        if not self.in_flight:
            buffers = fill(WANTED)
            buffers.draft_slots[:] = 0
            buffers.draft_slots[:, 1 : tree.rows] = tree.slots[0] * buffers.candidates.shape[-1] + tree.slots[1]
            self._executor.launch(buffers)
            self.in_flight = 1
        end = self._end_of_next(sequences, tree)
        if end is not None:
            self._executor.launch_next(end)
            self.in_flight += 1
        buffers = self._executor.collect()
        self.in_flight -= 1
        for sequence in sequences:
            sequence.draft = Draft(tree, buffers.tokens[sequence.slot, 1 : tree.rows])
        return buffers

    def awaits(self, sequence: Sequence) -> bool:
        """Whether a step of ``sequence`` is in flight."""
        return self.in_flight > 0 and any(each is sequence for each in self._group)

    def leave(self) -> None:
        """Discard what is in flight: the next step starts from the host."""
        self.in_flight = 0
        self._executor.discard()

    def _end_of_next(self, sequences: list[Sequence], tree: Tree) -> int | None:
        """Cache row past the last one of the step after the one in flight; None where it isn't needed or may not fit."""
        longest = max(int(self._slots.lengths[sequence.slot]) for sequence in sequences) + 1 + tree.depth
        farthest = max(longest, int(self._slots.lengths.max()))  # slots that stand still are written to as well
        end = self._margin + farthest + self._executor.buffers(tree.rows, WANTED).rows
        fits = longest < self._slots.capacity and end + self._margin <= self._executor.layout.rows
        return end if fits and all(sequence.remaining > 1 for sequence in sequences) else None


def _tree(sequence: Sequence) -> Tree:
    assert isinstance(sequence.drafter, FixedTree)
    return sequence.drafter.tree
