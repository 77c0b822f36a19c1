"""Runs the device graph on ONNX Runtime's CPU provider: slow and simple, to check the file that TensorRT engines are built of."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...runtime.executors import step_io
from ...runtime.executors.executor import CacheLayout, StepBuffers, Wanted, chain_ancestors, kept_rows, visible_rows
from ...runtime.executors.ort import OrtModel

_INPUTS = (step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.LOGIT_ROWS)
_RESULTS = (step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS)


@dataclass(slots=True)
class _Carried:
    """Holds the new rows [slots, H_kv, P, D_h] of the newest step, cache by cache, and where each slot wrote them."""

    rows: list[np.ndarray]
    write_index: np.ndarray


@dataclass(slots=True)
class DeviceGraphExecutor:
    """Implements :class:`.executor.Executor`: feeds whole arrays and copies every cache in every step."""

    model: OrtModel
    options: Any = None
    """Options of ONNX Runtime's session."""
    layout: CacheLayout = field(init=False)
    engine_seconds: float = 0.0
    closing: dict[str, np.ndarray] = field(default_factory=dict)
    """The newest step's outputs of ``step_io.CLOSING``, by name."""
    _session: Any = None
    _caches: list[np.ndarray] = field(default_factory=list)
    _carried: _Carried | None = None
    _buffers: dict[tuple[int, Wanted], StepBuffers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Load the graph; caches start as zeros."""
        import onnxruntime

        options = onnxruntime.SessionOptions() if self.options is None else self.options
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(self.model.step), options, providers=["CPUExecutionProvider"])
        self.layout = layout = self.model.layout
        shape = (layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        self._caches = [np.zeros(shape, layout.dtype) for _ in range(2 * layout.layers)]

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        """Return the buffers of a step of ``rows`` rows over all slots: the same object every time."""
        key = (rows, wanted)
        if key not in self._buffers:
            self._buffers[key] = self._allocate(self.layout.slots, rows, rows, wanted)
        return self._buffers[key]

    def step(self, buffers: StepBuffers, wanted: Wanted, draft_slots: np.ndarray | None = None) -> None:
        """Commit, write and verify the rows of ``buffers``; ``draft_slots`` int64 [B, N] for the closing outputs."""
        carried = self._carried or self._nothing(self.layout.slots)
        new = self._run(buffers, self._caches, carried, draft_slots)
        self._carried = _Carried(new, buffers.write_index.copy())

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        """Write a chunk int64 [n] at positions ``start`` … of one slot. Returns buffers [1, …]."""
        rows = len(tokens)
        buffers = self._allocate(1, rows, 1, wanted)
        buffers.idle(0, start)
        buffers.tokens[0] = tokens
        buffers.positions[0] = np.arange(start, start + rows)
        buffers.ancestors[0] = chain_ancestors(rows)
        buffers.forced[0] = rows
        self._run(buffers, [cache[slot : slot + 1] for cache in self._caches], self._nothing(1), None)
        return buffers

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Refuse: the device graph has no heads of its own.

        Raises:
            AssertionError: always.
        """
        raise AssertionError("the heads graph has a check of its own")

    def _run(
        self, buffers: StepBuffers, caches: list[np.ndarray], carried: _Carried, draft_slots: np.ndarray | None
    ) -> list[np.ndarray]:
        """Call the graph, write results and caches, and return the new rows."""
        layers = self.layout.layers
        kept, count = kept_rows(buffers.commit, buffers.write_index, carried.write_index)
        feeds: dict[str, np.ndarray] = {name: getattr(buffers, name) for name in _INPUTS}
        feeds |= {step_io.KEPT: kept, step_io.KEPT_COUNT: count}
        feeds[step_io.DRAFT_SLOTS] = np.zeros_like(buffers.tokens) if draft_slots is None else draft_slots
        feeds[step_io.COLUMNS] = np.arange(visible_rows(buffers, self.layout.rows))
        feeds |= dict(zip(step_io.past_names(layers), caches, strict=True))
        feeds |= dict(zip(step_io.carried_names(layers), carried.rows, strict=True))
        names = [output.name for output in self._session.get_outputs()]
        started = time.perf_counter()
        results = dict(zip(names, self._session.run(names, feeds), strict=True))
        self.engine_seconds += time.perf_counter() - started
        for name in (*_RESULTS, step_io.LOGITS, step_io.HIDDEN):
            target = getattr(buffers, name)
            if target.size:
                target[:] = results[name]
        for cache, present in zip(caches, step_io.present_names(layers), strict=True):
            cache[:] = results[present]
        self.closing = {name: results[name] for name in step_io.CLOSING}
        return [results[name] for name in step_io.new_names(layers)]

    def _nothing(self, slots: int) -> _Carried:
        layout = self.layout
        row = np.zeros((slots, layout.kv_heads, 1, layout.head_dim), layout.dtype)
        return _Carried([row] * (2 * layout.layers), np.zeros(slots, np.int64))

    def _allocate(self, slots: int, rows: int, logit_rows: int, wanted: Wanted) -> StepBuffers:
        model = self.model
        return StepBuffers.allocate(
            slots, rows, logit_rows, model.num_heads, model.top_k, model.hidden_size, model.vocab_size, self.layout.dtype, wanted
        )
