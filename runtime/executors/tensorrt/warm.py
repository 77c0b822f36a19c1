"""Runs the sizes that a session will use before its first request: kernels are compiled, and CUDA graphs captured."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...tree import Shape
from ..step_plan import SlotRows, StepPlan, Wanted
from .context import smallest_profile
from .executor import COLUMN_BUCKET, TrtExecutor

_REPEATS = 5
"""Steps of one size: the first carries rows of another size, the next one is enqueued, and each set is captured once."""


def warm(executor: TrtExecutor, sizes: Iterable[int]) -> int:
    """Run a prompt chunk, and steps of ``sizes`` rows over every visible length. Returns the CUDA graphs that there are now.

    Nothing is kept: the slots stay empty, and what the steps write lies behind every kept row. Steps of one row run without heads
    and with them. The runtime cache is written at the end.
    """
    abilities, layout = executor.abilities, executor.layout
    step_rows = abilities.step_rows or (1,)
    counts = sorted({smallest_profile(dict.fromkeys(step_rows, 0), rows) for rows in sizes if rows <= max(step_rows)})
    for count in counts:
        for visible in range(COLUMN_BUCKET, layout.rows + COLUMN_BUCKET, COLUMN_BUCKET):
            end = min(visible, layout.rows - abilities.deepest)
            length = end - abilities.deepest - count
            if length < 0:
                continue
            for heads in (False, True) if count == 1 else (True,):
                for _ in range(_REPEATS):
                    _step(executor, count, length, heads=heads)
    _prefill(executor)
    executor.contexts.save_cache()
    return len(executor.contexts.graphs)


def _step(executor: TrtExecutor, count: int, length: int, *, heads: bool) -> None:
    slots = executor.layout.slots
    shape = Shape.chain(count)
    rows = tuple(SlotRows(slot, np.zeros(count, np.int64), shape, wanted=Wanted(heads=heads)) for slot in range(slots))
    _raise_first(executor, StepPlan(rows, (length,) * slots, ((),) * slots))


def _prefill(executor: TrtExecutor) -> None:
    slots, count = executor.layout.slots, min(2, executor.layout.rows)
    rows = SlotRows(0, np.zeros(count, np.int64), Shape.chain(count), forced=count)
    _raise_first(executor, StepPlan((rows,), (0,) * slots, ((),) * slots))


def _raise_first(executor: TrtExecutor, plan: StepPlan) -> None:
    for found in executor.run(plan).slots:
        if isinstance(found, Exception):
            raise found
