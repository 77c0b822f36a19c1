"""TensorRT executor: a step's inputs, state and results stay on the device; the host reads one step late from pinned memory.

Two *sets* of buffers take turns. The set of a step holds its inputs, its results and the rows that it carries over from the
step before; what the step hands on (next inputs, new rows) is written into the other set, so that the next step needs no host.
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
from .staging import HostSide, RingSlot, Staged

COLUMN_BUCKET = 256
"""Visible cache rows grow in steps of this: each step is another CUDA graph, each row costs attention some bandwidth."""
RING = 4
"""Places for results: of two steps in flight, of the one that the host reads, and one to spare."""


class TrtExecutor:
    """Runs the device graph's engine on one stream. In the steady state nothing is allocated and the host waits for results only.

    ``contexts.graphs`` holds a CUDA graph for each (rows, carried rows, visible rows, set) that came again.
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
        """Allocate everything that steps use.

        ``open_heads``: opens the plan of the heads, which only sampling needs. ``weights``: addresses of weights by input.

        Raises:
            DeviceMemoryError: it doesn't fit.
            UsageError: no profile holds ``slots``.
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
        self._ring = [RingSlot.allocate(cuda, self._host.step_layout(self.max_rows).moving.nbytes) for _ in range(RING)]
        self._flying: deque[RingSlot] = deque()
        self._launched = 0
        self._now = 0  # the set that holds the next step's inputs
        self._carried = 1  # rows of the newest step, which the next one carries over
        self._began = np.zeros(slots, np.int64)  # and its write index

    # -- steps that the host decides -------------------------------------------------------------------------------

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        """Buffers of a step over all slots, of ``rows`` rows or the next larger number that the engine has a profile for.

        Raises:
            UsageError: the engine has no profile for so many.
        """
        fitting = [size for size in self._profiles if size >= rows]
        if not fitting:
            raise UsageError(
                f"a step of {rows} rows, the engine takes up to {self.max_rows}",
                hint=f"use fewer rows, or build it again with --rows {','.join(map(str, [*self._profiles, rows]))}",
            )
        return self._host.step(min(fitting), wanted).buffers

    def step(self, buffers: StepBuffers, wanted: Wanted) -> None:
        """Commit, write and verify the rows of ``buffers``; waits for the results.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        staged = self._host.step(buffers.rows, wanted)
        assert not self._flying and staged.buffers is buffers
        self._begin()
        self._finish(staged, self._start(staged))

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        """Write a chunk int64 [n] at positions ``start`` … of one slot; the returned buffers are [1, …].

        It uses buffers of its own: what other slots still have to move stays.
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
        moving = state.prefill_moving[0].address
        self._begin()
        self._upload(staged, state.prefill_fixed.address, moving)
        self.contexts.enqueue(self._prefill_profile, None, lambda: state.prefill_bindings(staged.layout, slot, visible))
        self._finish(staged, moving)
        return buffers

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads at rows chosen by the host: hidden [b, H], root int64 [b] to candidates and log_probs [b, K, k]."""
        self._heads = self._heads or self._open_heads()
        started = time.perf_counter()
        results = self._heads(hidden, root)
        self.engine_seconds += time.perf_counter() - started
        return results

    # -- running ahead ---------------------------------------------------------------------------------------------

    def launch(self, buffers: StepBuffers) -> None:
        """Start the step that ``buffers`` describes, ``draft_slots`` included; returns before it has run.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        assert not self._flying, "only one step is started from the host at a time"
        staged, slot = self._host.staged(buffers), self._next_slot()
        self._hand_over(slot, self._start(staged))

    def launch_next(self, end: int) -> None:
        """Start the step that follows from the newest one's outcome, as the device knows it; it writes no row from ``end`` on.

        Raises:
            CapacityError: rows would be written past the end of a cache.
        """
        assert self._flying, "there is no step to follow"
        self._check_room(end)
        slot = self._next_slot()
        self._hand_over(slot, self._run(self._host.step_layout(self._carried), end))

    def collect(self) -> StepBuffers:
        """Wait for the oldest step in flight. Returns its tokens and outputs, valid until two more steps are launched."""
        slot = self._flying.popleft()
        self._cuda.wait(slot.end)
        self.engine_seconds += self._cuda.seconds_between(slot.start, slot.end)
        buffers = slot.read(self._host.step_layout(slot.rows), self._manifest)
        self._began[:] = buffers.write_index
        return buffers

    def discard(self) -> None:
        """Forget the steps in flight, once they have run. What they had to move has been moved."""
        while self._flying:
            self.collect()

    # -- the stream ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._cuda.record(self._events[0], self._stream)

    def _start(self, staged: Staged) -> int:
        """Enqueue a step from the host's inputs. Returns the address of its moving part."""
        buffers = staged.buffers
        staged.kept[:], staged.kept_count[:] = kept_rows(buffers.commit, buffers.write_index, self._began)
        end = int(buffers.write_index.max()) + buffers.rows
        self._check_room(int((buffers.write_index - staged.kept_count).max()) + buffers.rows)
        self._upload(staged, self._state.fixed.address, self._state.moving[self._now].address)
        moving = self._run(staged.layout, end)
        self._began[:] = buffers.write_index
        return moving

    def _run(self, layout: StepLayout, end: int) -> int:
        """Enqueue a step from set to set. Returns the address of its moving part."""
        now, carried, visible = self._now, self._carried, self._visible(end)
        key = (layout.rows, carried, visible, now)
        self.contexts.enqueue(self._profiles[layout.rows], key, lambda: self._state.bindings(layout, now, carried, visible))
        self._now, self._carried = 1 - now, layout.rows
        return self._state.moving[now].address

    def _upload(self, staged: Staged, fixed: int, moving: int) -> None:
        self._cuda.upload(fixed, staged.fixed.address, staged.layout.fixed.nbytes, self._stream)
        self._cuda.upload(moving, staged.moving.address, staged.layout.moving_inputs, self._stream)

    def _finish(self, staged: Staged, moving: int) -> None:
        """Bring the results to the host's buffers and wait for them."""
        layout, (start, end), copy = staged.layout, self._events, self._cuda.download
        split = layout.moving_inputs
        copy(staged.moving.address + split, moving + split, layout.moving.nbytes - split, self._stream)
        for name, memory in staged.optional.items():
            nbytes = getattr(staged.buffers, name).nbytes
            copy(memory.address, self._state.optional[name].address, nbytes, self._stream)
        self._cuda.record(end, self._stream)
        self._cuda.wait(end)
        self.engine_seconds += self._cuda.seconds_between(start, end)

    def _next_slot(self) -> RingSlot:
        assert len(self._flying) < RING - 1, "the host may still read the slot that would be written"
        self._launched += 1
        slot = self._ring[self._launched % RING]
        self._cuda.record(slot.start, self._stream)
        return slot

    def _hand_over(self, slot: RingSlot, moving: int) -> None:
        """Let the step that was just enqueued leave its inputs and results in ``slot``."""
        slot.rows = self._carried
        self._cuda.download(slot.memory.address, moving, self._host.step_layout(slot.rows).moving.nbytes, self._stream)
        self._cuda.record(slot.end, self._stream)
        self._flying.append(slot)

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _visible(self, end: int) -> int:
        return min(-(-end // COLUMN_BUCKET) * COLUMN_BUCKET, self.layout.rows)

    def _check_room(self, end: int) -> None:
        """The graph writes K more rows than the step has; a device would put rows past a cache's end over valid ones."""
        end += self._manifest.heads.num_heads
        if end > self.layout.rows:
            raise CapacityError(
                f"a step would write up to cache row {end}, there are {self.layout.rows}",
                hint="ask for fewer tokens or rows, or export with a larger --capacity or --max-rows",
            )
