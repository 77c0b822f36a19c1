"""What the loop asks of an engine: buffers to fill, one call, buffers to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from . import step_io


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes of the caches: ``2 * layers`` tensors [slots, kv_heads, rows, head_dim]."""

    layers: int
    slots: int
    kv_heads: int
    rows: int
    head_dim: int
    dtype: str  # numpy name: float32 or float16


class Wanted(NamedTuple):  # a tuple, because every step looks its buffers up by it
    """Outputs that a call must deliver. Greedy decoding wants none of them; speculation wants the heads."""

    heads: bool = False
    logits: bool = False
    hidden: bool = False


@dataclass(slots=True)
class StepBuffers:
    """Inputs and outputs of one kind of call, allocated once; shapes and meanings are in :mod:`.step_io`.

    ``draft_slots`` is read by executors that run ahead.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ancestors: np.ndarray
    forced: np.ndarray
    write_index: np.ndarray
    logit_rows: np.ndarray
    commit: np.ndarray
    draft_slots: np.ndarray
    last_row: np.ndarray
    next_token: np.ndarray
    candidates: np.ndarray
    log_probs: np.ndarray
    logits: np.ndarray
    hidden: np.ndarray

    @classmethod
    def allocate(
        cls,
        slots: int,
        rows: int,
        logit_rows: int,
        heads: int,
        top_k: int,
        hidden: int,
        vocab: int,
        dtype: str,
        wanted: Wanted,
        *,
        moves: int | None = None,
    ) -> StepBuffers:
        """Zeroed buffers; optional outputs that aren't wanted have no rows. ``moves``: cache rows to copy (None: the margin)."""
        int64 = np.int64
        kept = logit_rows if wanted.logits else 0
        return cls(
            tokens=np.zeros((slots, rows), int64),
            positions=np.zeros((slots, rows), int64),
            ancestors=np.zeros((slots, rows, rows), bool),
            forced=np.zeros(slots, int64),
            write_index=np.zeros(slots, int64),
            logit_rows=np.tile(np.arange(rows - logit_rows, rows, dtype=int64), (slots, 1)),
            commit=np.zeros((slots, moves or heads), int64),
            draft_slots=np.zeros((slots, rows), int64),
            last_row=np.zeros(slots, int64),
            next_token=np.zeros(slots, int64),
            candidates=np.zeros((slots, heads, top_k), int64),
            log_probs=np.zeros((slots, heads, top_k), np.float32),
            logits=np.zeros((slots, kept, vocab), dtype),
            hidden=np.zeros((slots, logit_rows if wanted.hidden else 0, hidden), dtype),
        )

    @property
    def rows(self) -> int:
        """N, padding included."""
        return int(self.tokens.shape[1])

    @property
    def margin(self) -> int:
        """Cache rows before a slot's first one: as many as there are heads."""
        return int(self.candidates.shape[1])

    def move(self, slot: int, length: int, rows: list[int]) -> None:
        """Have cache ``rows`` copied to the end of the ``length`` committed ones; the others stay where they are."""
        end = self.margin + length
        self.commit[slot] = [*range(end - self.commit.shape[1], end - len(rows)), *rows]

    def idle(self, slot: int, length: int) -> None:
        """Make ``slot`` do nothing: every row is padding, written past the ``length`` committed rows."""
        self.ancestors[slot] = False
        self.forced[slot] = 0
        self.tokens[slot] = 0
        self.positions[slot] = 0
        self.write_index[slot] = self.margin + length
        self.move(slot, length, [])


class Executor(Protocol):
    """Owns the engine and the device memory of all slots. One call at a time."""

    layout: CacheLayout
    engine_seconds: float
    """Wall time spent inside the engine so far."""

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        """Buffers of a step of ``rows`` rows over all slots; the same object every time."""
        ...

    def step(self, buffers: StepBuffers, wanted: Wanted) -> None:
        """Commit, write and verify the rows of ``buffers``; results are in ``buffers`` afterwards."""
        ...

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        """Write a chunk int64 [n] at positions ``start`` … of one slot; the returned buffers are [1, …]."""
        ...

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads at rows chosen by the host: hidden [b, H], root int64 [b] to candidates and log_probs [b, K, k]."""
        ...


@runtime_checkable
class AheadExecutor(Executor, Protocol):
    """An executor that can start a step before the host has read the one before it.

    The steps that it starts itself verify the same tree, in the same slots, as the one that was launched. While steps are in
    flight, nothing but these four methods is called.
    """

    def launch(self, buffers: StepBuffers) -> None:
        """Start the step that ``buffers`` describes, ``draft_slots`` included; returns before it has run."""
        ...

    def launch_next(self, end: int) -> None:
        """Start the step that follows from the newest one's outcome, as the device knows it.

        ``end``: the cache row past the last one that the step may write, whatever that outcome is.
        """
        ...

    def collect(self) -> StepBuffers:
        """Wait for the oldest step in flight. Returns its tokens and outputs, valid until two more steps are launched."""
        ...

    def discard(self) -> None:
        """Forget the steps in flight, once they have run. What they had to move has been moved."""
        ...


def visible_rows(buffers: StepBuffers, cache_rows: int, granularity: int = 64) -> int:
    """T: cache rows that this step may look at, rounded up so that it changes seldom."""
    end = int(max(buffers.write_index.tolist())) + buffers.rows  # every step asks: for few slots Python's max is the faster one
    return min(-(-end // granularity) * granularity, cache_rows)


def chain_ancestors(rows: int) -> np.ndarray:
    """Ancestors of a chain, bool [N, N]: every row sees all rows before it."""
    return np.tri(rows, dtype=bool)


def kept_rows(commit: np.ndarray, write_index: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``commit`` as the device graph wants it: ``kept`` int64 [B, K] and ``kept_count`` int64 [B].

    ``commit`` int64 [B, K]: cache rows to copy to write_index-K …; ``before`` int64 [B]: the write index of the step whose rows
    they are. From the first row that isn't in place already, all are kept.
    """
    slots, margin = commit.shape
    order = np.arange(margin)
    moves = commit != write_index[:, None] - margin + order
    count = np.where(moves.any(1), margin - moves.argmax(1), 0)
    taken = order < count[:, None]
    rows = np.take_along_axis(commit, np.minimum(order + (margin - count)[:, None], margin - 1), 1) - before[:, None]
    assert slots == len(before) and (rows[taken] >= 0).all(), "only rows of the step before can be out of place"
    return np.where(taken, rows, 0), count


__all__ = [
    "AheadExecutor", "CacheLayout", "Executor", "StepBuffers", "Wanted", "chain_ancestors", "kept_rows", "step_io",
    "visible_rows",
]  # fmt: skip
