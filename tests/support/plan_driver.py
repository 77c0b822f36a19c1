"""Step plans made by hand, as the loop makes them: for tests that ask an executor directly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from medusa_deploy.runtime.executors.executor import Executor
from medusa_deploy.runtime.executors.step_plan import NO_OUTPUTS, SlotResult, SlotRows, StepPlan, StepResult, Wanted, rows_to_move
from medusa_deploy.runtime.tree import Shape, Tree

HEADS_WANTED = Wanted(heads=True)


def chunk(slot: int, tokens: Sequence[int], wanted: Wanted = NO_OUTPUTS) -> SlotRows:
    """A prefill chunk."""
    return SlotRows(slot, np.array(tokens, np.int64), Shape.chain(len(tokens)), len(tokens), wanted)


def succeeded(result: StepResult) -> list[SlotResult]:
    """All results of a step; the first exception among them is raised."""
    found = []
    for each in result.slots:
        if isinstance(each, Exception):
            raise each
        found.append(each)
    return found


class Caller:
    """What the loop knows of an executor's slots: lengths, rows to move, roots, and candidates. It accepts greedily."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        slots = executor.abilities.slots
        self.lengths = [0] * slots
        self.moves: list[tuple[int, ...]] = [()] * slots
        self.roots = [0] * slots
        self.candidates: list[np.ndarray | None] = [None] * slots

    def verifies(self, slot: int, tree: Tree, wanted: Wanted = HEADS_WANTED) -> SlotRows:
        """The root and the candidates on ``tree``."""
        tokens = np.empty(tree.rows, np.int64)
        tokens[0] = self.roots[slot]
        if tree.rows > 1:
            candidates = self.candidates[slot]
            assert candidates is not None
            tokens[1:] = candidates[tree.slots[0], tree.slots[1]]
        return SlotRows(slot, tokens, tree, 1, wanted)

    def plan(self, active: Iterable[SlotRows] = (), follow: Tree | None = None) -> StepPlan:
        """The next step."""
        return StepPlan(tuple(active), tuple(self.lengths), tuple(self.moves), follow)

    def commit(self, plan: StepPlan, results: Sequence[SlotResult], most: int | None = None) -> list[list[int]]:
        """Take in the results; at most ``most`` drafted tokens of each. Returns the tokens that each emitted."""
        self.moves = [()] * len(self.moves)
        emitted = []
        for rows, found in zip(plan.active, results, strict=True):
            slot = rows.slot
            path = () if rows.prefills else rows.shape.row_paths[found.last_row][:most]
            self.moves[slot] = rows_to_move(self.lengths[slot], path)
            self.lengths[slot] += rows.count if rows.prefills else 1 + len(path)
            self.roots[slot] = found.next_token
            self.candidates[slot] = None if found.candidates is None else found.candidates.copy()
            emitted.append([*rows.tokens[list(path)].tolist(), found.next_token])
        return emitted

    def step(self, *active: SlotRows, follow: Tree | None = None) -> list[list[int]]:
        """Run one step. Returns the tokens that each slot emitted."""
        plan = self.plan(active, follow)
        return self.commit(plan, succeeded(self.executor.run(plan)))

    def prompt(self, slot: int, tokens: Sequence[int], size: int = 16) -> int:
        """Fill an empty slot, ``size`` tokens at a time. Returns the first token."""
        self.lengths[slot] = 0
        first = -1
        for start in range(0, len(tokens), size):
            ((first,),) = self.step(chunk(slot, tokens[start : start + size], HEADS_WANTED))
        return first

    def greedy(self, slot: int, tree: Tree, count: int, *, follow: bool = True) -> list[int]:
        """Emit at least ``count`` tokens after the root."""
        emitted: list[int] = []
        while len(emitted) < count:
            emitted += self.step(self.verifies(slot, tree), follow=tree if follow else None)[0]
        return emitted
