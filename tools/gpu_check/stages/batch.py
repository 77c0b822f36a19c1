"""Measures steps of several slots at once: every executor that loads the bundle, plainly and with rows to verify."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ....runtime.executors.one_slot import run_prompt
from ....runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, Wanted
from ....runtime.tree import Shape
from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ....runtime.session import Session

SLOTS = (1, 4, 8, 16, 32)
ROWS = (1, 16)
_CONTEXT = 200


def run(options: Options, report: Report) -> None:
    """Put ``results[backend][rows][slots]``: ms a step, and plain tokens/s of all slots together."""
    from ..executors import loaded_sessions

    for backend, session in loaded_sessions(options, report, slots=SLOTS):
        report.check_time(30)
        try:
            report.put(backend, _sweep(session, min(options.repeats, 15)))
        except Exception as error:
            report.skip(f"executor {backend}", error)


def _sweep(session: Session, rounds: int) -> dict[str, Any]:
    """Time steps of the first n slots, all numbers of slots and rows in turn, behind equal contexts."""
    executor, manifest = session.executor, session.manifest
    most, vocab = executor.abilities.slots, manifest.backbone.vocab_size
    context = min(_CONTEXT, manifest.limits.capacity // 2)
    rng = np.random.default_rng(0)
    for slot in range(most):
        run_prompt(executor, slot, rng.integers(0, vocab, context).tolist(), manifest.limits.prefill_chunk, [0] * most)
    kinds = [(slots, rows) for rows in ROWS if rows <= session.max_rows for slots in SLOTS if slots <= most]
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for turn in range(1 + rounds):
        for slots, rows in kinds:
            plan = _plan(slots, rows, rng.integers(0, vocab, rows), context, most)
            started = time.perf_counter()
            found = executor.run(plan).slots
            taken = time.perf_counter() - started
            failed = next((each for each in found if not isinstance(each, SlotResult)), None)
            if failed is not None:
                raise failed
            if turn:  # the first round warms up
                seconds[slots, rows].append(taken)
    result: dict[str, Any] = {"context": context, "rounds": rounds, "rows": {}}
    for (slots, rows), times in seconds.items():
        entry = {"ms": 1e3 * median(times)} | ({"tokens_per_s": slots / median(times)} if rows == 1 else {})
        result["rows"].setdefault(str(rows), {})[str(slots)] = entry
    return result


def _plan(slots: int, rows: int, tokens: np.ndarray, length: int, most: int) -> StepPlan:
    """The same rows for the first ``slots`` slots: a root with children."""
    shape = Shape.of((-1, *[0] * (rows - 1)))
    active = tuple([SlotRows(slot, tokens, shape, 1, Wanted(heads=rows > 1)) for slot in range(slots)])
    return StepPlan(active, (length,) * most, ((),) * most)
