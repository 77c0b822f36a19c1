"""Runs the device graph on ONNX Runtime's CPU provider: slow and simple, to check the file that TensorRT engines are built of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...runtime.executors import step_io
from ...runtime.executors.executor import Abilities, CacheLayout
from ...runtime.executors.ort_base import OrtModel
from ...runtime.executors.step_arrays import StepInputs, StepOutputs, visible_rows
from ...runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, StepResult

_INPUTS = (step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.LOGIT_ROWS)
_RESULTS = (step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS, step_io.LOGITS, step_io.HIDDEN)


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
    watch: Callable[[dict[str, np.ndarray]], object] = lambda _feeds: None
    """Hears the inputs of each call, by name, before it runs."""
    layout: CacheLayout = field(init=False)
    abilities: Abilities = field(init=False)
    engine_seconds: float = 0.0
    closing: dict[str, np.ndarray] = field(default_factory=dict)
    """Outputs ``step_io.CLOSING`` of the newest call, by name."""
    _session: Any = None
    _caches: list[np.ndarray] = field(default_factory=list)
    _carried: _Carried | None = None

    def __post_init__(self) -> None:
        """Load the graph; caches start as zeros."""
        import onnxruntime

        options = onnxruntime.SessionOptions() if self.options is None else self.options
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(self.model.step), options, providers=["CPUExecutionProvider"])
        self.layout = layout = self.model.layout
        self.abilities = Abilities(layout.slots, self.model.num_heads, padded=layout.slots > 1)
        shape = (layout.slots, layout.kv_heads, layout.rows, layout.head_dim)
        self._caches = [np.zeros(shape, layout.dtype) for _ in range(2 * layout.layers)]

    def run(self, plan: StepPlan, draft_slots: np.ndarray | None = None) -> StepResult:
        """Run the plan: all slots in one call, then each prefill chunk; see :class:`.executor.Executor`.

        ``draft_slots`` int64 [B, N]: candidates that the closing outputs of the first call fill the next step's rows with.
        """
        found: dict[int, SlotResult | Exception] = {}
        decoding = [rows for rows in plan.active if not rows.prefills]
        if decoding or any(plan.moves):
            found |= self._batch(plan, decoding, draft_slots)
        for rows in plan.active:
            if rows.prefills:
                found[rows.slot] = self._prefill(rows, plan.lengths[rows.slot])
        return StepResult(tuple([found[rows.slot] for rows in plan.active]))

    def _batch(self, plan: StepPlan, active: list[SlotRows], draft_slots: np.ndarray | None) -> dict[int, SlotResult]:
        """Make one call over all slots; those without rows in ``active`` rest."""
        slots, by_slot = self.layout.slots, {rows.slot: rows for rows in active}
        count = max((rows.count for rows in active), default=1)
        inputs = StepInputs.allocate(slots, count, count, self.model.num_heads)
        for slot, (length, moves) in enumerate(zip(plan.lengths, plan.moves, strict=True)):
            if slot in by_slot:
                inputs.fill(by_slot[slot], length, moves, slot)
            else:
                inputs.rest(length, moves, slot)
        carried = self._carried or self._nothing(slots)
        kept = kept_rows(plan.moves, carried.write_index - self.model.num_heads, self.model.num_heads)
        # Rows that the heads run at: none where a plain step wants no candidates.
        heads = int(count > 1 or draft_slots is not None or any(rows.wanted.heads for rows in active))
        outputs, new, seconds = self._call(inputs, self._caches, carried, kept, draft_slots, heads)
        self._carried = _Carried(new, inputs.write_index)
        return {rows.slot: outputs.result(rows.slot, rows, seconds) for rows in active}

    def _prefill(self, rows: SlotRows, length: int) -> SlotResult:
        """Make one call over the slot of ``rows``."""
        inputs = StepInputs.allocate(1, rows.count, 1, self.model.num_heads)
        inputs.fill(rows, length)
        caches = [cache[rows.slot : rows.slot + 1] for cache in self._caches]
        kept = kept_rows([()], np.zeros(1, np.int64), self.model.num_heads)
        outputs, _, seconds = self._call(inputs, caches, self._nothing(1), kept, None, int(rows.wanted.heads))
        return outputs.result(0, rows, seconds)

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Refuse: the device graph has no heads of its own.

        Raises:
            AssertionError: always.
        """
        raise AssertionError("the heads graph has a check of its own")

    def _call(
        self,
        inputs: StepInputs,
        caches: list[np.ndarray],
        carried: _Carried,
        kept: tuple[np.ndarray, np.ndarray],
        draft_slots: np.ndarray | None,
        heads: int,
    ) -> tuple[StepOutputs, list[np.ndarray], float]:
        """Run the graph and write the caches. Returns its outputs, its new rows and the seconds that it took."""
        layers = self.layout.layers
        end = int(inputs.write_index.max()) + inputs.rows
        feeds: dict[str, np.ndarray] = {name: getattr(inputs, name) for name in _INPUTS}
        feeds |= dict(zip((step_io.KEPT, step_io.KEPT_COUNT), kept, strict=True))
        feeds[step_io.DRAFT_SLOTS] = np.zeros_like(inputs.tokens) if draft_slots is None else draft_slots
        feeds[step_io.COLUMNS] = np.arange(visible_rows(end, self.layout.rows))
        feeds |= dict(zip(step_io.past_names(layers), caches, strict=True))
        feeds |= dict(zip(step_io.carried_names(layers), carried.rows, strict=True))
        if any(value.name == step_io.HEAD_ROWS for value in self._session.get_inputs()):
            feeds[step_io.HEAD_ROWS] = np.zeros(heads, np.int64)
        names = [output.name for output in self._session.get_outputs()]
        self.watch(feeds)
        started = time.perf_counter()
        results = dict(zip(names, self._session.run(names, feeds), strict=True))
        seconds = time.perf_counter() - started
        self.engine_seconds += seconds
        for cache, present in zip(caches, step_io.present_names(layers), strict=True):
            cache[:] = results[present]
        self.closing = {name: results[name] for name in step_io.CLOSING}
        outputs = StepOutputs(**{name: results[name] for name in _RESULTS})
        return outputs, [results[name] for name in step_io.new_names(layers)], seconds

    def _nothing(self, slots: int) -> _Carried:
        layout = self.layout
        row = np.zeros((slots, layout.kv_heads, 1, layout.head_dim), layout.dtype)
        return _Carried([row] * (2 * layout.layers), np.zeros(slots, np.int64))


def kept_rows(moves: Sequence[tuple[int, ...]], before: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """``moves`` of a plan as the device graph takes them: ``kept`` int64 [B, K] and ``kept_count`` int64 [B].

    ``before`` int64 [B]: rows that each slot kept when the previous step wrote behind them.
    """
    kept, count = np.zeros((len(moves), heads), np.int64), np.array([len(rows) for rows in moves])
    for slot, rows in enumerate(moves):
        kept[slot, : len(rows)] = np.array(rows, np.int64) - before[slot]
    assert (kept >= 0).all(), "only rows of the step before can be out of place"
    return kept, count
