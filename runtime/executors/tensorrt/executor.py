"""Runs steps on TensorRT. Inputs, state and results stay on the device; the host reads results one step late, from pinned memory.

Two *sets* of buffers take turns (:mod:`.memory` has a picture). The current set holds a step's inputs, its results, and the rows
carried over from the step before. The step writes the next inputs and its new rows into the other set: the next step doesn't
wait for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import CapacityError, UsageError
from ...files.engine_record import EngineRecord
from ...files.manifest import Manifest
from ..executor import CacheLayout, StepBuffers, Wanted, chain_ancestors, kept_rows
from .buffers import StepLayout
from .context import Contexts, profiles_by_rows
from .cuda import Cuda
from .engine import Engine
from .heads import TrtHeads
from .memory import DeviceState
from .staging import HostSide, RingEntry, Staged

COLUMN_BUCKET = 256
"""The number of visible cache rows is a multiple of this. Smaller: more CUDA graphs. Larger: attention reads more rows."""
RING = 4
"""Entries of the ring of results: two for steps in flight, one that the host reads, one to spare."""


class TrtExecutor:
    """Runs the device graph's engine on one stream. A step allocates nothing, and the host waits for results only.

    ``contexts.graphs`` holds a CUDA graph for each repeated (rows, carried rows, visible rows, set).
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
        graphs: bool = True,
    ) -> None:
        """Allocates everything that steps use.

        ``open_heads``: opens the plan of the heads, which only sampling needs. ``weights``: device addresses by input name.

        Raises:
            DeviceMemoryError: the buffers don't fit on the device.
            UsageError: no profile takes ``slots`` slots.
        """
        backbone, limits = manifest.backbone, manifest.limits
        self.layout = CacheLayout(backbone.layers, slots, backbone.kv_heads, limits.cache_rows, backbone.head_dim, manifest.dtype)
        self.engine_seconds = 0.0
        self._cuda, self._stream, self._manifest = cuda, stream, manifest
        self._prefill_profile, self._profiles = profiles_by_rows(record, slots)
        self.step_rows = tuple(sorted(self._profiles))
        self.max_rows = self.step_rows[-1]
        chunk = record.profiles[self._prefill_profile].rows[2]
        self.contexts = Contexts(cuda, stream, step, graphs=graphs)
        self._state = DeviceState(cuda, manifest, slots, self.max_rows, chunk, weights)
        self._state.write_columns(stream)
        self._open_heads: Callable[[], TrtHeads] = lambda: TrtHeads(cuda, stream, manifest, open_heads(), slots, weights)
        self._heads: TrtHeads | None = None
        self._host = HostSide(cuda, manifest, slots, self._profiles, chunk)
        self._events = cuda.event(), cuda.event()
        self._ring = [RingEntry.allocate(cuda, self._host.step_layout(self.max_rows).per_step.nbytes) for _ in range(RING)]
        self._flying: deque[RingEntry] = deque()
        self._launched = 0
        self._current_set = 0  # holds the next step's inputs
        self._carried_rows = 1  # rows of the newest step: the next step takes them over
        self._last_write_index = np.zeros(slots, np.int64)  # write index of the newest step

    # -- steps that the host decides -------------------------------------------------------------------------------

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        """Returns the buffers of a step over all slots. Its rows: the smallest number ≥ ``rows`` that has a profile.

        Raises:
            UsageError: no profile has that many rows.
        """
        fitting = [size for size in self._profiles if size >= rows]
        if not fitting:
            raise UsageError(
                f"a step of {rows} rows, the engine takes up to {self.max_rows}",
                hint=f"use fewer rows, or build it again with --rows {','.join(map(str, [*self._profiles, rows]))}",
            )
        return self._host.step(min(fitting), wanted).buffers

    def step(self, buffers: StepBuffers, wanted: Wanted) -> None:
        """Commits accepted rows, writes and verifies the rows of ``buffers``, and waits for the results.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        staged = self._host.step(buffers.rows, wanted)
        assert not self._flying and staged.buffers is buffers
        self._begin()
        self._finish(staged, self._start(staged))

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        """Writes a chunk int64 [n] at positions ``start`` … of one slot. Returns buffers [1, …].

        A prefill has its own buffers, so the carried rows of other slots stay.
        """
        assert not self._flying, "collect or discard what is in flight first"
        rows, state = len(tokens), self._state
        staged = self._host.prompt(rows, wanted)
        buffers = staged.buffers
        buffers.idle(0, start)
        buffers.tokens[0] = tokens
        buffers.positions[0] = np.arange(start, start + rows)
        buffers.ancestors[0] = chain_ancestors(rows)
        buffers.forced[0] = rows
        visible = self._visible(int(buffers.write_index[0]) + rows)
        per_step = state.prefill_per_step[0].address
        self._begin()
        self._upload(staged, state.prefill_per_shape.address, per_step)
        self.contexts.enqueue(self._prefill_profile, None, lambda: state.prefill_bindings(staged.layout, slot, visible))
        self._finish(staged, per_step)
        return buffers

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs the heads at rows chosen by the host: hidden [b, H], root int64 [b] → candidates, log_probs [b, K, k]."""
        self._heads = self._heads or self._open_heads()
        started = time.perf_counter()
        results = self._heads(hidden, root)
        self.engine_seconds += time.perf_counter() - started
        return results

    # -- running ahead ---------------------------------------------------------------------------------------------

    def launch(self, buffers: StepBuffers) -> None:
        """Starts the step that ``buffers`` and their ``draft_slots`` describe. Returns before it has run.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        assert not self._flying, "only one step is started from the host at a time"
        staged, entry = self._host.staged(buffers), self._next_entry()
        self._hand_over(entry, self._start(staged))

    def launch_next(self, end: int) -> None:
        """Starts the step after the newest one, with the inputs that the device computed. It writes only rows below ``end``.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        assert self._flying, "there is no step to follow"
        self._check_room(end)
        entry = self._next_entry()
        self._hand_over(entry, self._run(self._host.step_layout(self._carried_rows), end))

    def collect(self) -> StepBuffers:
        """Waits for the oldest step in flight. Returns its tokens and outputs, valid until two more steps are launched."""
        entry = self._flying.popleft()
        self._cuda.wait(entry.end)
        self.engine_seconds += self._cuda.seconds_between(entry.start, entry.end)
        buffers = entry.read(self._host.step_layout(entry.rows), self._manifest)
        self._last_write_index[:] = buffers.write_index
        return buffers

    def discard(self) -> None:
        """Waits for the steps in flight and drops their results. They have moved the rows that they had to move."""
        while self._flying:
            self.collect()

    # -- the stream ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._cuda.record(self._events[0], self._stream)

    def _start(self, staged: Staged) -> int:
        """Enqueues a step with the host's inputs. Returns the address of its block per step."""
        buffers = staged.buffers
        staged.kept[:], staged.kept_count[:] = kept_rows(buffers.commit, buffers.write_index, self._last_write_index)
        end = int(buffers.write_index.max()) + buffers.rows
        self._check_room(int((buffers.write_index - staged.kept_count).max()) + buffers.rows)
        self._upload(staged, self._state.per_shape.address, self._state.per_step[self._current_set].address)
        per_step = self._run(staged.layout, end)
        self._last_write_index[:] = buffers.write_index
        return per_step

    def _run(self, layout: StepLayout, end: int) -> int:
        """Enqueues a step on the current set and swaps the sets. Returns the address of its block per step."""
        current, carried, visible = self._current_set, self._carried_rows, self._visible(end)
        key = (layout.rows, carried, visible, current)
        self.contexts.enqueue(self._profiles[layout.rows], key, lambda: self._state.bindings(layout, current, carried, visible))
        self._current_set, self._carried_rows = 1 - current, layout.rows
        return self._state.per_step[current].address

    def _upload(self, staged: Staged, per_shape: int, per_step: int) -> None:
        self._cuda.upload(per_shape, staged.per_shape.address, staged.layout.per_shape.nbytes, self._stream)
        self._cuda.upload(per_step, staged.per_step.address, staged.layout.input_bytes, self._stream)

    def _finish(self, staged: Staged, per_step: int) -> None:
        """Copies the results into the host's buffers and waits for them."""
        layout, (start, end), copy = staged.layout, self._events, self._cuda.download
        split = layout.input_bytes
        copy(staged.per_step.address + split, per_step + split, layout.per_step.nbytes - split, self._stream)
        for name, memory in staged.optional.items():
            nbytes = getattr(staged.buffers, name).nbytes
            copy(memory.address, self._state.optional[name].address, nbytes, self._stream)
        self._cuda.record(end, self._stream)
        self._cuda.wait(end)
        self.engine_seconds += self._cuda.seconds_between(start, end)

    def _next_entry(self) -> RingEntry:
        assert len(self._flying) < RING - 1, "the host may still read the entry that would be written"
        self._launched += 1
        entry = self._ring[self._launched % RING]
        self._cuda.record(entry.start, self._stream)
        return entry

    def _hand_over(self, entry: RingEntry, per_step: int) -> None:
        """Copies the inputs and results of the step that was just enqueued into ``entry``."""
        entry.rows = self._carried_rows
        self._cuda.download(entry.memory.address, per_step, self._host.step_layout(entry.rows).per_step.nbytes, self._stream)
        self._cuda.record(entry.end, self._stream)
        self._flying.append(entry)

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _visible(self, end: int) -> int:
        return min(-(-end // COLUMN_BUCKET) * COLUMN_BUCKET, self.layout.rows)

    def _check_room(self, end: int) -> None:
        """Refuses a step that would write past a cache's end. The graph writes K rows past the step's own.

        A device would put rows past the end over valid ones.
        """
        end += self._manifest.heads.num_heads
        if end > self.layout.rows:
            raise CapacityError(
                f"a step would write up to cache row {end}, there are {self.layout.rows}",
                hint="ask for fewer tokens or rows, or export with a larger --capacity or --max-rows",
            )
