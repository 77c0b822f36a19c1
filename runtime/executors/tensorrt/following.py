"""Running ahead: what the step in flight computes, and whether it is what the host asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...tree import Tree
from .. import step_io
from ..step_plan import SlotRows, StepPlan


def goes_on(plan: StepPlan) -> Tree | None:
    """Returns the tree of the step after ``plan``'s, if the device can work out its inputs alone; else None.

    The device drafts on the tree that it verifies, accepts greedily, and keeps resting slots where they are. It doesn't know that
    a slot has grown by a prefill chunk.
    """
    tree = plan.follow
    if tree is None or not plan.active or not all(_verifies(rows, tree) for rows in plan.active):
        return None
    return tree


def head_rows(rows: int, decoding: Sequence[SlotRows], tree: Tree | None) -> int:
    """Returns the rows that a step's heads run at: 0 if it is plain and wants no candidates, nor does the device for ``tree``."""
    return int(rows > 1 or (tree is not None and tree.rows > 1) or any(each.wanted.heads for each in decoding))


def _verifies(rows: SlotRows, tree: Tree) -> bool:
    """Tells if greedy decoding verifies ``rows`` on ``tree``."""
    return rows.shape is tree and rows.forced == 1 and not (rows.wanted.logits or rows.wanted.hidden)


@dataclass(frozen=True, slots=True)
class Following:
    """The step in flight verifies ``tokens`` [slot] on ``tree``, behind ``lengths`` [slot] rows. Resting slots have no tokens."""

    tree: Tree
    lengths: tuple[int, ...]
    tokens: Mapping[int, np.ndarray]
    heads: int

    @classmethod
    def after(cls, plan: StepPlan, tree: Tree, results: Mapping[str, np.ndarray], heads: int) -> Following:
        """Works out from a plan's ``results`` what the device made of them: the step's next lengths and tokens.

        ``heads``: rows that the step in flight runs its heads at.
        """
        lengths, tokens = list(plan.lengths), {}
        for rows in plan.active:
            slot = rows.slot
            lengths[slot] += 1 + int(tree.depths[results[step_io.LAST_ROW][slot]])
            tokens[slot] = np.empty(tree.rows, np.int64)
            tokens[slot][0] = results[step_io.NEXT_TOKEN][slot]
            tokens[slot][1:] = results[step_io.CANDIDATES][slot][tree.slots[0], tree.slots[1]]
        return cls(tree, tuple(lengths), tokens, heads)

    def has_results_of(self, decoding: Sequence[SlotRows], lengths: tuple[int, ...]) -> bool:
        """Tells if its results are those of ``decoding`` behind ``lengths``.

        Slots that have ended since don't matter. No slot may have grown behind the step's back: its padding and the rows of ended
        slots lie behind the rows that a slot had before.
        """
        return (
            len(decoding) > 0
            and all(now <= then for now, then in zip(lengths, self.lengths, strict=True))
            and all(
                rows.slot in self.tokens
                and _verifies(rows, self.tree)
                and (self.heads or not rows.wanted.heads)
                and lengths[rows.slot] == self.lengths[rows.slot]
                and np.array_equal(rows.tokens, self.tokens[rows.slot])
                for rows in decoding
            )
        )
