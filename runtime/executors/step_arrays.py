"""Arrays of one engine call: a plan encoded for the step graphs, and their small outputs decoded into results."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from .step_plan import SlotResult, SlotRows, Wanted

KEPT_BYTES = 128 << 20
"""Buffers that an executor keeps between steps. Those of a larger step are made anew each time."""

_KEPT_KINDS = 512


@dataclass(slots=True)
class StepInputs:
    """Small inputs of the standard graph; shapes and meanings are in :mod:`.step_io`.

    ``margin``: cache rows before a slot's first one.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ancestors: np.ndarray
    forced: np.ndarray
    write_index: np.ndarray
    logit_rows: np.ndarray
    commit: np.ndarray
    margin: int

    @classmethod
    def allocate(cls, slots: int, rows: int, logit_rows: int, margin: int) -> StepInputs:
        """Zeroed inputs of ``slots`` slots with ``rows`` rows each, the last ``logit_rows`` of which get logits."""
        int64 = np.int64
        return cls(
            tokens=np.zeros((slots, rows), int64),
            positions=np.zeros((slots, rows), int64),
            ancestors=np.zeros((slots, rows, rows), bool),
            forced=np.zeros(slots, int64),
            write_index=np.zeros(slots, int64),
            logit_rows=np.tile(np.arange(rows - logit_rows, rows, dtype=int64), (slots, 1)),
            commit=np.zeros((slots, margin), int64),
            margin=margin,
        )

    @property
    def rows(self) -> int:
        """N, padding included."""
        return int(self.tokens.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the larger arrays."""
        return self.tokens.nbytes + self.positions.nbytes + self.ancestors.nbytes + self.commit.nbytes

    def fill(self, rows: SlotRows, length: int, moves: tuple[int, ...] = (), index: int = 0) -> None:
        """Encode ``rows`` behind ``length`` kept rows as entry ``index`` of the batch; rows past them become padding."""
        count = rows.count
        if count < self.rows:
            self.ancestors[index] = False
            self.tokens[index, count:] = 0
            self.positions[index, count:] = length
        self.tokens[index, :count] = rows.tokens
        self.ancestors[index, :count, :count] = rows.shape.ancestors
        self.positions[index, :count] = length + rows.shape.depths
        self.forced[index] = rows.forced
        self._place(index, length, moves)

    def rest(self, length: int, moves: tuple[int, ...] = (), index: int = 0) -> None:
        """Make entry ``index`` of the batch pure padding, which is written behind the ``length`` rows that its slot keeps."""
        self.ancestors[index] = False
        self.tokens[index] = 0
        self.positions[index] = 0
        self.forced[index] = 0
        self._place(index, length, moves)

    def _place(self, index: int, length: int, moves: tuple[int, ...]) -> None:
        end = self.margin + length
        self.write_index[index] = end
        # Rows that stay are copied onto themselves: a step always moves as many as there are heads.
        self.commit[index] = [*range(end - self.margin, end - len(moves)), *(self.margin + row for row in moves)]


@dataclass(slots=True)
class StepOutputs:
    """Outputs of a call over B slots; shapes and meanings are in :mod:`.step_io`. Optional ones that aren't wanted are empty."""

    last_row: np.ndarray
    next_token: np.ndarray
    candidates: np.ndarray
    log_probs: np.ndarray
    logits: np.ndarray
    hidden: np.ndarray

    @classmethod
    def allocate(
        cls, slots: int, logit_rows: int, heads: int, top_k: int, hidden: int, vocab: int, dtype: str, wanted: Wanted
    ) -> StepOutputs:
        """Zeroed outputs. ``logit_rows``: R. Without heads the hidden states are there to tell NaN by."""
        int64 = np.int64
        return cls(
            last_row=np.zeros(slots, int64),
            next_token=np.zeros(slots, int64),
            candidates=np.zeros((slots, heads, top_k), int64),
            log_probs=np.zeros((slots, heads, top_k), np.float32),
            logits=np.zeros((slots, logit_rows if wanted.logits else 0, vocab), dtype),
            hidden=np.zeros((slots, logit_rows if wanted.hidden or not wanted.heads else 0, hidden), dtype),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the larger arrays."""
        return self.candidates.nbytes + self.log_probs.nbytes + self.logits.nbytes + self.hidden.nbytes

    def result(self, index: int, rows: SlotRows, seconds: float) -> SlotResult:
        """Entry ``index`` of the batch as the result of ``rows``. Arrays are views, valid until the next call."""
        delivered = slice(1 if rows.prefills else rows.count)
        return slot_result(
            rows,
            seconds,
            last_row=int(self.last_row[index]),
            next_token=int(self.next_token[index]),
            candidates=self.candidates[index],
            log_probs=self.log_probs[index],
            logits=self.logits[index, delivered],
            hidden=self.hidden[index, delivered],
        )


def slot_result(
    rows: SlotRows,
    seconds: float,
    *,
    last_row: int,
    next_token: int,
    candidates: np.ndarray | None,
    log_probs: np.ndarray | None,
    logits: np.ndarray | None,
    hidden: np.ndarray | None,
) -> SlotResult:
    """Give ``rows`` what they want of one slot's outputs. ``logits`` and ``hidden`` hold the slot's own rows.

    ``hidden`` may be None or empty if the call ran the heads, for this slot or for another one: ``log_probs`` tell NaN then.
    """
    wanted = rows.wanted
    if hidden is not None and len(hidden):
        finite = math.isfinite(hidden[min(last_row, len(hidden) - 1)].sum(dtype=np.float32))
    else:
        assert log_probs is not None
        finite = not math.isnan(log_probs[0, 0])
    return SlotResult(
        last_row,
        next_token,
        finite,
        candidates=candidates if wanted.heads else None,
        log_probs=log_probs if wanted.heads else None,
        logits=logits if wanted.logits else None,
        hidden=hidden if wanted.hidden else None,
        seconds=seconds,
    )


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int:
        """How much."""
        ...


Kind = TypeVar("Kind", bound=Sized)


class Recent(Generic[Kind]):
    """Buffers by kind of call. The least recently used ones go when all hold more than ``limit`` bytes.

    Buffers may grow while they are in use: that is counted when others are asked for.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, Kind] = OrderedDict()
        self._counted: dict[Hashable, int] = {}
        self._newest: Hashable = None
        self.nbytes = 0

    def get(self, key: Hashable, make: Callable[[], Kind]) -> Kind:
        """The buffers of ``key``, made where they aren't kept."""
        self._count()
        found, self._newest = self._kept.get(key), key
        if found is None:
            self._kept[key] = found = make()
            self._count()
        else:
            self._kept.move_to_end(key)
        return found

    def _count(self) -> None:
        """Count the buffers that were asked for last; drop what is too much then."""
        newest = self._kept.get(self._newest)
        before = self._counted.get(self._newest, 0)
        if newest is None or newest.nbytes == before:
            return
        self._counted[self._newest] = newest.nbytes
        self.nbytes += newest.nbytes - before
        while len(self._kept) > _KEPT_KINDS or self.nbytes > self._limit:
            oldest, _ = self._kept.popitem(last=False)
            self.nbytes -= self._counted.pop(oldest, 0)


def visible_rows(end: int, cache_rows: int, granularity: int = 64) -> int:
    """T: cache rows that a step may look at whose last row is ``end - 1``, rounded up so that it changes seldom."""
    return min(-(-end // granularity) * granularity, cache_rows)
