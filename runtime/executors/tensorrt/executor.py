"""Runs step plans on TensorRT. Inputs, state and results stay on the device; the host may read results one step late.

Two *sets* of buffers take turns (:mod:`.memory` has a picture). The current set holds a step's inputs, its results, and the rows
carried over from the step before. The step writes the next inputs and its new rows into the other set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...errors import CapacityError
from ...files.engine_record import EngineRecord
from ...files.manifest import Manifest
from ...tree import Tree
from .. import step_io
from ..executor import Abilities, CacheLayout
from ..step_plan import NanSlots, SlotResult, SlotRows, StepPlan, StepResult
from .buffers import StepLayout
from .context import Contexts, profiles_by_rows, smallest_profile
from .cuda import Cuda
from .engine import Engine
from .following import Following, goes_on, head_rows
from .heads import TrtHeads
from .memory import DeviceState
from .runtime_cache import RuntimeCache
from .staging import HostSide, Landing, OptionalOutputs, Staged

COLUMN_BUCKET = 256
"""Visible cache rows are a multiple of this. Smaller: more CUDA graphs. Larger: attention reads more rows."""
RING = 3
"""Places for results: of the step that the caller reads, of the one that the host waits for, and of the one that runs ahead."""


class TrtExecutor:
    """Runs the device graph's engine on one stream. A step allocates nothing, and the host waits for results only.

    A plan becomes one step over all slots, padded to a profile's number of rows, and one call for each prefill chunk. Resting
    slots get padding behind the rows that they keep. ``contexts.graphs`` holds a CUDA graph for each repeated (rows,
    carried rows, visible rows, rows of the heads, set).
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: Any,
        manifest: Manifest,
        record: EngineRecord,
        step: Engine,
        open_heads: Callable[[], Engine],
        slots: int,
        weights: Mapping[str, int],
        *,
        cache: RuntimeCache | None = None,
        graphs: bool = True,
    ) -> None:
        """Allocates everything that steps use, logits and hidden states on the host excepted.

        ``open_heads``: opens the plan of the heads, which only sampling needs. ``weights``: device addresses by input name.

        Raises:
            DeviceMemoryError: the buffers don't fit on the device.
            UsageError: no profile takes ``slots`` slots.
        """
        backbone, limits = manifest.backbone, manifest.limits
        self.layout = CacheLayout(backbone.layers, slots, backbone.kv_heads, limits.cache_rows, backbone.head_dim, manifest.dtype)
        self.engine_seconds = 0.0
        self._cuda, self._stream = cuda, stream
        self._margin, self._top_k = manifest.heads.num_heads, manifest.heads.top_k
        self._prefill_profile, self._profiles = profiles_by_rows(record, slots)
        self.abilities = Abilities(slots, self._margin, tuple(self._profiles), padded=True, ahead=True)
        most, chunk = max(self._profiles), record.profiles[self._prefill_profile].rows[2]
        self.contexts = Contexts(cuda, stream, step, cache, graphs=graphs)
        takes_head_rows = step_io.HEAD_ROWS in {tensor.name for tensor in record.inputs}
        self._head_rows = head_rows if takes_head_rows else lambda _rows, _decoding, _tree: 1
        self._state = DeviceState(cuda, manifest, slots, most, chunk, weights, takes_head_rows=takes_head_rows)
        self._state.write_columns(stream)
        self._open_heads: Callable[[], TrtHeads] = lambda: TrtHeads(cuda, stream, manifest, open_heads(), slots, weights)
        self._heads: TrtHeads | None = None
        self._host = HostSide(cuda, manifest, slots, self._profiles, chunk)
        self._optional = OptionalOutputs(cuda, manifest, self._state.optional)
        sums = step_io.STATE_SUM in {tensor.name for tensor in record.outputs}
        largest = [self._host.step_layout(most)] * RING, [self._host.prompt_layout(chunk)] * slots
        places = ([Landing.allocate(cuda, layout.per_step.nbytes, sums=sums) for layout in each] for each in largest)
        self._ring, self._chunks = places
        self._current_set = 0  # holds the next step's inputs
        self._carried_rows = 1  # rows of the newest step: the next step takes them over
        self._launched = 0  # steps that the stream got
        self._delivered = 0  # the newest one that the caller has the results of
        self._began = (0,) * slots  # rows before that one's, in each slot
        self._flying: deque[Landing] = deque()  # launched, not waited for
        self._following: Following | None = None  # what the step in flight computes
        self._with_nan = NanSlots()
        self._unsettled = False  # a run that failed has left something in the stream

    def run(self, plan: StepPlan) -> StepResult:
        """Runs the plan: one step of the decoding slots, then each prefill chunk; see :class:`.executor.Executor`.

        With ``follow``, the step after this one is enqueued before the host waits for this one's results. If the next plan asks
        for that step, its results are collected. Else the step in flight is discarded: its rows lie behind every kept row, and it
        has moved what was to be moved.
        """
        decoding = [rows for rows in plan.active if not rows.prefills]
        found: dict[int, SlotResult | Exception] = {}
        concerned = plan.active
        try:
            self._settle()
            self._with_nan.clear_reused(plan, lambda slot: self._state.clear(slot, self._stream))
            self._optional.reserve(plan.active)
            concerned = tuple(decoding) or plan.active
            found |= self._decode(plan, decoding)
        except AssertionError:
            raise
        except Exception as error:
            if not concerned:
                raise
            found |= dict.fromkeys([rows.slot for rows in concerned], error)
        for rows in plan.active:
            if rows.slot not in found:
                found[rows.slot] = self._prefill(rows, plan.lengths[rows.slot])
        self._unsettled = any(isinstance(each, Exception) for each in found.values())
        return self._with_nan.noted(plan, StepResult(tuple([found[rows.slot] for rows in plan.active])))

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs the heads at rows chosen by the host: hidden [b, H], root int64 [b] → candidates, log_probs [b, K, k]."""
        self._heads = self._heads or self._open_heads()
        results = self._heads(hidden, root)
        self.engine_seconds += self._heads.seconds
        return results

    # -- one step over all slots -----------------------------------------------------------------------------------

    def _decode(self, plan: StepPlan, decoding: Sequence[SlotRows]) -> dict[int, SlotResult | Exception]:
        """Runs the step of the ``decoding`` slots, which moves the accepted rows of all slots."""
        tree = goes_on(plan)
        following, self._following = self._following, None
        if following is not None and following.has_results_of(decoding, plan.lengths):
            if len(decoding) < len(following.tokens):
                tree = None  # the device would go on with the slots that have ended
        else:
            self._discard()
            # A step that was launched after the caller's newest results has moved what they accepted.
            moves = plan.moves if self._launched == self._delivered else ((),) * len(plan.moves)
            if not decoding and not any(moves):
                return {}
            self._start(plan, decoding, moves, tree)
        if tree is not None:
            self._start_following(plan, tree)
        return self._collect(plan, decoding, tree)

    def _start(self, plan: StepPlan, decoding: Sequence[SlotRows], moves: tuple[tuple[int, ...], ...], tree: Tree | None) -> None:
        """Enqueues a step with the host's inputs. ``tree``: what the step after it verifies, if it follows from this one.

        Raises:
            CapacityError: rows would be written past the end of a cache.
            UsageError: no profile has that many rows.
        """
        staged = self._host.step(smallest_profile(self._profiles, max((rows.count for rows in decoding), default=1)))
        inputs, by_slot = staged.inputs, {rows.slot: rows for rows in decoding}
        for slot, length in enumerate(plan.lengths):
            kept = tuple([row - self._began[slot] for row in moves[slot]])
            assert all(0 < row < self._carried_rows for row in kept), "only rows of the newest step can be out of place"
            if slot in by_slot:
                inputs.fill(by_slot[slot], length, kept, slot)
            else:
                inputs.rest(length, kept, slot)
        if tree is not None:
            inputs.draft_slots[:] = 0
            inputs.draft_slots[:, 1 : tree.rows] = tree.slots[0] * self._top_k + tree.slots[1]
        self._check_room(int((inputs.write_index - inputs.kept_count).max()) + inputs.rows)
        longest = max((plan.lengths[rows.slot] for rows in decoding), default=0)
        heads = self._head_rows(inputs.rows, decoding, tree)
        self._launch(staged.layout, self._margin + longest + inputs.rows, heads, staged, decoding)

    def _start_following(self, plan: StepPlan, tree: Tree) -> None:
        """Enqueues the step after ``plan``'s with the inputs that the device computes, if the longest outcome leaves room for it.

        The first step of a group is followed like every other one. One loop steps all sequences in every plan, so those that take
        turns discard nothing. Where some end all the same, the step in flight still serves the others.
        """
        layout = self._host.step_layout(self._carried_rows)
        longest = 1 + tree.depth + max(plan.lengths[rows.slot] for rows in plan.active)
        if self._fits(self._margin + max(longest, *plan.lengths) + layout.rows):
            self._launch(layout, self._margin + longest + layout.rows, self._head_rows(layout.rows, plan.active, tree))

    def _launch(
        self, layout: StepLayout, end: int, heads: int, staged: Staged | None = None, decoding: Sequence[SlotRows] = ()
    ) -> None:
        """Enqueues a step whose active slots look at cache rows below ``end``, and the copies of its results.

        ``heads``: rows of its heads. ``staged``: inputs of the host (None: of the device). ``decoding`` may want others.
        """
        assert len(self._flying) < RING - 1, "the caller may still read the place that would be written"
        landing, per_step = self._ring[self._launched % RING], self._state.per_step[self._current_set].address
        self._cuda.record(landing.start, self._stream)
        if staged is not None:
            self._upload(staged, self._state.per_shape.address, per_step)
        self._run_step(layout, end, heads)
        self._launched += 1
        landing.number, landing.heads = self._launched, heads
        self._land(landing, layout, per_step, decoding)
        self._flying.append(landing)

    def _run_step(self, layout: StepLayout, end: int, heads: int) -> None:
        """Enqueues the engine on the current set and swaps the sets."""
        current, carried, visible = self._current_set, self._carried_rows, self._visible(end)
        key = (layout.rows, carried, visible, heads, current)
        bindings = partial(self._state.bindings, layout, current, carried, visible, heads)
        self.contexts.enqueue(self._profiles[layout.rows], key, bindings)
        self._current_set, self._carried_rows = 1 - current, layout.rows

    def _collect(self, plan: StepPlan, decoding: Sequence[SlotRows], tree: Tree | None) -> dict[int, SlotResult | Exception]:
        """Waits for the oldest step in flight, which is ``plan``'s, and returns its results by slot."""
        landing = self._flying.popleft()
        seconds = self._wait(landing)
        self._delivered, self._began = landing.number, plan.lengths
        if self._flying and tree is not None:
            self._following = Following.after(plan, tree, landing.views, self._flying[0].heads)
        tokens = landing.views[step_io.TOKENS]
        assert all(np.array_equal(tokens[rows.slot, : rows.count], rows.tokens) for rows in decoding), "another step's results"
        return {rows.slot: landing.result(rows.slot, rows, seconds, self._optional.of(rows.slot)) for rows in decoding}

    def _discard(self) -> None:
        """Waits for the steps in flight and forgets their results."""
        while self._flying:
            self._wait(self._flying.popleft())

    def _settle(self) -> None:
        """Waits for what a run that failed has left: its uploads read buffers that the host is about to fill."""
        if self._unsettled:
            self._cuda.synchronize(self._stream)
            self._flying.clear()
            self._following = None
        self._unsettled = True

    # -- a prefill chunk -------------------------------------------------------------------------------------------

    def _prefill(self, rows: SlotRows, length: int) -> SlotResult | Exception:
        """Writes and verifies one chunk. It has its own buffers, so the carried rows of other slots stay."""
        state, landing = self._state, self._chunks[rows.slot]
        try:
            staged = self._host.prompt(rows.count)
            staged.inputs.fill(rows, length)
            end = self._margin + length + rows.count
            self._check_room(end)
            visible, per_step = self._visible(end), state.prefill_per_step[0].address
            self._cuda.record(landing.start, self._stream)
            self._upload(staged, state.prefill_per_shape.address, per_step)
            bindings = partial(state.prefill_bindings, staged.layout, rows.slot, visible, self._head_rows(1, [rows], None))
            self.contexts.enqueue(self._prefill_profile, None, bindings)
            self._land(landing, staged.layout, per_step, [rows])
            return landing.result(0, rows, self._wait(landing), self._optional.of(rows.slot))
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the driver or TensorRT raise ends this slot alone
            return error

    # -- the stream ------------------------------------------------------------------------------------------------

    def _upload(self, staged: Staged, per_shape: int, per_step: int) -> None:
        self._cuda.upload(per_shape, staged.per_shape.address, staged.layout.per_shape.nbytes, self._stream)
        self._cuda.upload(per_step, staged.per_step.address, staged.layout.inputs.nbytes, self._stream)

    def _land(self, landing: Landing, layout: StepLayout, per_step: int, active: Sequence[SlotRows]) -> None:
        """Enqueues the copies of the call's inputs and results into ``landing``, and of what the ``active`` rows want beside."""
        landing.expect(layout)
        self._cuda.download(landing.memory.address, per_step, layout.per_step.nbytes, self._stream)
        for rows in active:
            self._optional.download(0 if rows.prefills else rows.slot, rows.slot, layout.logit_rows, self._stream)
        self._cuda.record(landing.end, self._stream)

    def _wait(self, landing: Landing) -> float:
        """Waits until the results have landed. Returns the call's seconds on the device."""
        self._cuda.wait(landing.end)
        seconds = self._cuda.seconds_between(landing.start, landing.end)
        self.engine_seconds += seconds
        return seconds

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _visible(self, end: int) -> int:
        return min(-(-end // COLUMN_BUCKET) * COLUMN_BUCKET, self.layout.rows)

    def _fits(self, end: int) -> bool:
        """Tells if a cache has room for a step's own rows below ``end`` and for the K rows that the graph writes past them.

        A device would put rows past the end over valid ones.
        """
        return end + self._margin <= self.layout.rows

    def _check_room(self, end: int) -> None:
        if not self._fits(end):
            raise CapacityError(
                f"a step would write up to cache row {end + self._margin}, there are {self.layout.rows}",
                hint="ask for fewer tokens or rows, or export with a larger --capacity or --max-rows",
            )
