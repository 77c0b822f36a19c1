"""From the sequences of a step to its plan."""

from __future__ import annotations

import numpy as np

from ..drafting.draft import FixedTree
from ..executors.one_slot import prefill_rows
from ..executors.step_plan import NO_OUTPUTS, SlotRows, StepPlan, Wanted
from ..tree import Tree
from .scheduler import Turn
from .sequence import Sequence
from .slots import SlotPool


def step_plan(turns: list[Turn], slots: SlotPool, *, ahead: bool = False) -> StepPlan:
    """The plan of one step. ``ahead``: whether the executor can use the tree that follows."""
    active = tuple([_prompt_rows(turn) if turn.prompt_rows else _decode_rows(turn.sequence) for turn in turns])
    return StepPlan(active, tuple(slots.lengths.tolist()), slots.moves, _follow(turns) if ahead else None)


def _prompt_rows(turn: Turn) -> SlotRows:
    """The next chunk of a prompt; the last one delivers what the first step needs."""
    sequence, start = turn.sequence, turn.sequence.computed
    end = start + turn.prompt_rows
    wanted = _wanted(sequence) if end == sequence.prompt_length else NO_OUTPUTS
    return prefill_rows(sequence.slot, np.array(sequence.tokens[start:end], np.int64), wanted)


def _decode_rows(sequence: Sequence) -> SlotRows:
    """The root, then the rows that the sequence drafts below it."""
    draft = sequence.draft
    tokens = np.empty(draft.shape.rows, np.int64)
    tokens[0] = sequence.root
    tokens[1:] = draft.tokens
    return SlotRows(sequence.slot, tokens, draft.shape, 1, _wanted(sequence))


def _wanted(sequence: Sequence) -> Wanted:
    drafts, on_host = sequence.drafter.heads, sequence.on_host
    return Wanted(drafts and not on_host, on_host, (drafts and on_host) or sequence.keep_hidden)


def _follow(turns: list[Turn]) -> Tree | None:
    """The tree that all these sequences verify now and in the next step: greedy, decoding, and with tokens to go."""
    first = turns[0].sequence.drafter
    if not isinstance(first, FixedTree):
        return None
    for turn in turns:
        sequence = turn.sequence
        same = isinstance(sequence.drafter, FixedTree) and sequence.drafter.tree is first.tree
        if turn.prompt_rows or not same or sequence.on_host or sequence.keep_hidden or sequence.remaining < 2:
            return None
    return first.tree
