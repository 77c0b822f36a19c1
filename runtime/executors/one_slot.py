"""Steps with rows of one slot alone: checks, measuring and calibration run the engine this way, below the loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tree import Shape
from .executor import Executor
from .step_plan import NO_OUTPUTS, SlotResult, SlotRows, StepPlan, Wanted


def prefill_rows(slot: int, tokens: np.ndarray, wanted: Wanted = NO_OUTPUTS) -> SlotRows:
    """A chunk int64 [n] of a prompt as rows: a chain, every row of which is accepted."""
    count = len(tokens)
    return SlotRows(slot, tokens, Shape.chain(count), count, wanted)


def plan_of_one(rows: SlotRows, lengths: Sequence[int], moves: tuple[int, ...] = ()) -> StepPlan:
    """The plan in which one slot has ``rows`` and the others rest.

    ``lengths``: rows that each slot keeps. ``moves``: of the slot of ``rows``.
    """
    moves_of_all = tuple([moves if slot == rows.slot else () for slot in range(len(lengths))])
    return StepPlan((rows,), tuple(lengths), moves_of_all)


def run_one(executor: Executor, rows: SlotRows, lengths: Sequence[int], moves: tuple[int, ...] = ()) -> SlotResult:
    """Run :func:`plan_of_one`. Raises the exception that the engine call ended with, if it failed."""
    (result,) = executor.run(plan_of_one(rows, lengths, moves)).slots
    if isinstance(result, Exception):
        raise result
    return result


def run_prompt(
    executor: Executor, slot: int, tokens: Sequence[int], chunk: int, lengths: Sequence[int], wanted: Wanted = NO_OUTPUTS
) -> SlotResult:
    """Write a prompt into a slot from its first row on, ``chunk`` tokens a step. Returns the last step's result.

    ``wanted``: outputs of the prompt's last row. Raises the exception that an engine call ended with, if one failed.
    """
    ids, kept = np.asarray(tokens, np.int64), list(lengths)
    starts = range(0, len(ids), chunk)
    for start in starts:
        kept[slot] = start
        rows = prefill_rows(slot, ids[start : start + chunk], wanted if start == starts[-1] else NO_OUTPUTS)
        result = run_one(executor, rows, kept)
    return result
