"""Step plans with rows of one slot, for tests that drive executors themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_deploy.runtime.executors.executor import Executor
from medusa_deploy.runtime.executors.one_slot import plan_of_one, prefill_rows
from medusa_deploy.runtime.executors.step_plan import NO_OUTPUTS, SlotResult, SlotRows, StepPlan, Wanted
from medusa_deploy.runtime.tree import ROOT_ONLY, Shape

EVERYTHING = Wanted(heads=True, logits=True, hidden=True)
Tokens = Sequence[int] | np.ndarray


def prefill_plan(slots: int, slot: int, tokens: Tokens, start: int = 0, wanted: Wanted = NO_OUTPUTS) -> StepPlan:
    """A chunk of a prompt behind ``start`` rows of ``slot``; the other slots are empty."""
    return plan_of_one(prefill_rows(slot, np.asarray(tokens, np.int64), wanted), _lengths(slots, slot, start))


def tree_plan(
    slots: int,
    slot: int,
    shape: Shape,
    tokens: Tokens,
    length: int,
    moves: tuple[int, ...] = (),
    wanted: Wanted = NO_OUTPUTS,
) -> StepPlan:
    """Rows of ``shape`` behind ``length`` rows of ``slot``; the other slots are empty."""
    rows = SlotRows(slot, np.asarray(tokens, np.int64), shape, wanted=wanted)
    return plan_of_one(rows, _lengths(slots, slot, length), moves)


def plain_plan(slots: int, slot: int, token: int, length: int, wanted: Wanted = NO_OUTPUTS) -> StepPlan:
    """A root alone behind ``length`` rows of ``slot``; the other slots are empty."""
    return tree_plan(slots, slot, ROOT_ONLY, [token], length, wanted=wanted)


def run(executor: Executor, plan: StepPlan) -> list[SlotResult]:
    """Run a plan none of whose calls fails."""
    results = []
    for result in executor.run(plan).slots:
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def prefill(executor: Executor, slot: int, tokens: Tokens, start: int = 0, wanted: Wanted = NO_OUTPUTS) -> SlotResult:
    """Run a chunk of a prompt while the other slots are empty."""
    (result,) = run(executor, prefill_plan(executor.layout.slots, slot, tokens, start, wanted))
    return result


def verify(
    executor: Executor,
    slot: int,
    shape: Shape,
    tokens: Tokens,
    length: int,
    moves: tuple[int, ...] = (),
    wanted: Wanted = NO_OUTPUTS,
) -> SlotResult:
    """Run rows of ``shape`` behind ``length`` rows of ``slot`` while the other slots are empty."""
    (result,) = run(executor, tree_plan(executor.layout.slots, slot, shape, tokens, length, moves, wanted))
    return result


def _lengths(slots: int, slot: int, length: int) -> list[int]:
    return [length if each == slot else 0 for each in range(slots)]
