"""A step as data: the plan that the loop makes, and the result that an executor returns for it.

A step is rows of some slots. A prefill chunk is a forced chain of rows, a plain step is a root, a speculative step is a tree. An
executor turns a plan into masks, buffers and engine calls; nothing above it knows of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tree import Shape, Tree


class Wanted(NamedTuple):  # a tuple, because executors look their buffers up by it
    """Outputs that a slot's rows must deliver. Greedy decoding wants none of them; speculation wants the heads."""

    heads: bool = False
    logits: bool = False
    hidden: bool = False


NO_OUTPUTS = Wanted()


def wanted_by_any(active: Sequence[SlotRows]) -> Wanted:
    """The outputs that one call over these rows must deliver."""
    return Wanted(*map(any, zip(*[rows.wanted for rows in active], strict=True)))


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The rows of one slot in one step.

    ``tokens`` int64 [N]: row 0 is the root, or the first token of a prefill chunk. ``shape``: how the rows hang together. Row i
    stands at position ``length + shape.depths[i]`` of the slot. ``forced``: rows accepted unconditionally, 1 in decoding (the
    root) and N in prefill.
    """

    slot: int
    tokens: np.ndarray
    shape: Shape
    forced: int = 1
    wanted: Wanted = NO_OUTPUTS

    @property
    def count(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def prefills(self) -> bool:
        """Whether all of several rows are forced: only the last row's outputs are delivered then, R = 1 instead of N."""
        return self.forced > 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all slots.

    ``active``: at most one entry a slot. The other slots keep their rows. ``lengths``: the rows that each slot keeps, one entry a
    slot; its new rows come behind them. ``moves``: for each slot, rows that the previous step wrote and that were accepted. The
    step copies them to the end of the kept rows before it reads anything: the last entry to row ``length - 1``, the one before it
    to ``length - 2``. ``follow``: the tree that the active slots will verify next unless one of them ends; an executor that runs
    ahead may start that step early.

    Rows are counted from the slot's first token; a cache holds them behind its margin (:mod:`.step_io`).
    """

    active: tuple[SlotRows, ...]
    lengths: tuple[int, ...]
    moves: tuple[tuple[int, ...], ...]
    follow: Tree | None = None


@dataclass(slots=True)
class SlotResult:
    """What the engine returned for one slot. Arrays are valid until the executor's next run.

    ``last_row``: the deepest accepted row. ``next_token``: argmax of the logits at that row. ``finite``: whether the numbers at
    that row are. ``candidates`` int64 [K, k] and ``log_probs`` float32 [K, k]: the heads' at that row. ``logits`` [R, V] and
    ``hidden`` [R, H]: of all rows; of the last one alone in prefill. ``seconds``: wall time of the engine call with these rows.
    """

    last_row: int
    next_token: int
    finite: bool = True
    candidates: np.ndarray | None = None
    log_probs: np.ndarray | None = None
    logits: np.ndarray | None = None
    hidden: np.ndarray | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry for each of the plan's ``active``: a result, or the exception that its engine call ended with."""

    slots: tuple[SlotResult | Exception, ...]


class NanSlots(set[int]):
    """Slots whose caches may hold NaN.

    Masks hide stale rows by weights of 0, and 0 · NaN is NaN: an executor clears such a slot before it reads a new prompt.
    """

    def clear_reused(self, plan: StepPlan, clear: Callable[[int], None]) -> None:
        """Call ``clear`` with each slot that ``plan`` begins anew."""
        for slot in [rows.slot for rows in plan.active if rows.slot in self and not plan.lengths[rows.slot]]:
            clear(slot)
            self.remove(slot)

    def noted(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Add the slots whose results aren't finite, and return ``result``."""
        pairs = zip(plan.active, result.slots, strict=True)
        self |= {rows.slot for rows, found in pairs if isinstance(found, SlotResult) and not found.finite}
        return result


def rows_to_move(length: int, path: tuple[int, ...]) -> tuple[int, ...]:
    """The slot's rows that a step behind ``length`` rows wrote for the accepted ``path`` and that aren't in place yet.

    ``path``: rows of the step from below the root down. Row i of it belongs at ``length + 1 + i``; from the first one that lies
    elsewhere, all are moved.
    """
    for place, row in enumerate(path, start=1):
        if row != place:
            return tuple([length + row for row in path[place - 1 :]])
    return ()
