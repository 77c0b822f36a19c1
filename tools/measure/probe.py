"""Direct calls to a session's engine: what measuring needs and generating doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from ...runtime.executors.one_slot import run_one, run_prompt
from ...runtime.executors.step_plan import NO_OUTPUTS, SlotResult, SlotRows, Wanted
from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY, Tree, chain


class Probe:
    """Holds one slot of a session and runs prefills and steps on it. Use as a context manager.

    Rows [0, ``length``) of the slot are committed. A step of a tree commits its root row only, and only when it is asked to.
    The session may generate between two calls, and not during one: the engine takes one call at a time.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.slot = -1

    @property
    def length(self) -> int:
        """Committed rows. The slot pool knows them, so that padding of other requests' steps comes behind them."""
        return int(self._session.slots.lengths[self.slot])

    @length.setter
    def length(self, rows: int) -> None:
        self._session.slots.lengths[self.slot] = rows

    def __enter__(self) -> Self:
        self._session.slots.acquire(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.slots.release(self)

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Start over with ``tokens``, in the session's chunks; the logits [V] after the last one, float32."""
        chunk, lengths = self._session.manifest.limits.prefill_chunk, self._session.slots.lengths.tolist()
        result = run_prompt(self._session.executor, self.slot, tokens, chunk, lengths, Wanted(logits=True))
        self.length = len(tokens)
        logits: np.ndarray = _logits(result)[0]
        return logits

    def restart(self, tokens: Sequence[int]) -> None:
        """Start over with ``tokens``, which may be none."""
        self.length = 0
        if tokens:
            self.prefill(tokens)

    def step(
        self, tokens: Sequence[int], tree: Tree = ROOT_ONLY, wanted: Wanted = NO_OUTPUTS, *, commit: bool = False
    ) -> SlotResult:
        """One step of ``tree`` with ``tokens`` in its rows."""
        result = self._run(SlotRows(self.slot, np.asarray(tokens, np.int64), tree, wanted=wanted))
        self.length += int(commit)
        return result

    def root_logits(self, root: int, tree: Tree = ROOT_ONLY, *, commit: bool = False) -> np.ndarray:
        """Logits [V] after ``root``, float32, computed in a step of the tree's rows (the others carry token 0)."""
        result = self.step([root] + [0] * (tree.rows - 1), tree, Wanted(logits=True), commit=commit)
        logits: np.ndarray = _logits(result)[0]
        return logits

    def chain_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [n, V] after each of these tokens, float32, computed in one step; all of them are committed."""
        result = self.step(tokens, chain(len(tokens) - 1), Wanted(logits=True))
        self.length += len(tokens)
        return _logits(result)

    def candidates(self, root: int) -> tuple[int, np.ndarray]:
        """The token that the backbone chooses after ``root``, and what the heads propose after that, int64 [K, k]; commits it."""
        result = self.step([root], wanted=Wanted(heads=True), commit=True)
        assert result.candidates is not None, "they were wanted"
        return result.next_token, result.candidates.copy()

    def replay(self, prompt: Sequence[int], emitted: Sequence[int]) -> np.ndarray:
        """Logits [V] after ``prompt`` and ``emitted``, computed as plain decoding computes them: prefill, then row by row."""
        logits = self.prefill(prompt)
        for token in emitted[:-1]:
            self.step([token], commit=True)
        return self.root_logits(emitted[-1], commit=True) if emitted else logits

    def _run(self, rows: SlotRows) -> SlotResult:
        """Run ``rows`` in the probe's slot; the others rest."""
        return run_one(self._session.executor, rows, self._session.slots.lengths.tolist())


def _logits(result: SlotResult) -> np.ndarray:
    """A copy [R, V], float32."""
    assert result.logits is not None, "they were wanted"
    return result.logits.astype(np.float32)
