"""Direct calls to a session's engine: what measuring needs and generating doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from ...runtime.executors.executor import StepBuffers, Wanted
from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY, Tree, chain


class Probe:
    """Holds one slot of a session and runs prefills and steps on it. Use as a context manager.

    Rows [0, ``length``) of the slot are committed. A step of a tree commits its root row only, and only when it is asked to.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._executor = session.executor
        self._margin = session.manifest.heads.num_heads
        self._slot = -1
        self.length = 0

    def __enter__(self) -> Self:
        self._slot = self._session.slots.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.slots.release(self._slot)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Start over with ``tokens``, in the session's chunks; the logits [V] after the last one, float32."""
        ids = np.asarray(tokens, np.int64)
        size = self._session.manifest.limits.prefill_chunk
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            last = start + len(chunk) == len(ids)
            buffers = self._executor.prefill(self._slot, chunk, start, Wanted(logits=last))
        self.length = len(ids)
        logits: np.ndarray = buffers.logits[0, 0].astype(np.float32)
        return logits

    def restart(self, tokens: Sequence[int]) -> None:
        """Start over with ``tokens``, which may be none."""
        self.length = 0
        if tokens:
            self.prefill(tokens)

    def step(
        self, tokens: Sequence[int], tree: Tree = ROOT_ONLY, wanted: Wanted | None = None, *, commit: bool = False
    ) -> StepBuffers:
        """One step of ``tree`` with ``tokens`` in its rows."""
        wanted = wanted or Wanted()
        buffers = self._executor.buffers(tree.rows, wanted)
        for slot in range(self._executor.layout.slots):
            buffers.idle(slot, self.length if slot == self._slot else 0)
        rows = tree.rows  # engines may take more, the rest of which are padding
        buffers.tokens[self._slot, :rows] = tokens
        buffers.positions[self._slot, :rows] = self.length + tree.depths
        buffers.ancestors[self._slot, :rows, :rows] = tree.ancestors
        buffers.forced[self._slot] = 1
        buffers.write_index[self._slot] = self._margin + self.length
        self._executor.step(buffers, wanted)
        self.length += int(commit)
        return buffers

    def root_logits(self, root: int, tree: Tree = ROOT_ONLY, *, commit: bool = False) -> np.ndarray:
        """Logits [V] after ``root``, float32, computed in a step of the tree's rows (the others carry token 0)."""
        buffers = self.step([root] + [0] * (tree.rows - 1), tree, Wanted(logits=True), commit=commit)
        logits: np.ndarray = buffers.logits[self._slot, 0].astype(np.float32)
        return logits

    def chain_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [n, V] after each of these tokens, float32, computed in one step; all of them are committed."""
        buffers = self.step(tokens, chain(len(tokens) - 1), Wanted(logits=True))
        self.length += len(tokens)
        logits: np.ndarray = buffers.logits[self._slot, : len(tokens)].astype(np.float32)
        return logits

    def candidates(self, root: int) -> tuple[int, np.ndarray]:
        """The token that the backbone chooses after ``root``, and what the heads propose after that, int64 [K, k]; commits it."""
        buffers = self.step([root], wanted=Wanted(heads=True), commit=True)
        return int(buffers.next_token[self._slot]), buffers.candidates[self._slot].copy()

    def replay(self, prompt: Sequence[int], emitted: Sequence[int]) -> np.ndarray:
        """Logits [V] after ``prompt`` and ``emitted``, computed as plain decoding computes them: prefill, then row by row."""
        logits = self.prefill(prompt)
        for token in emitted[:-1]:
            self.step([token], commit=True)
        return self.root_logits(emitted[-1], commit=True) if emitted else logits
