"""Device memory of all steps, allocated once, and the address of each tensor of a step.

Two sets take turns. Step t reads one set; it leaves its results there, and writes the inputs and the carried rows of step t+1
into the other one. Nothing passes through the host::

    set 0                                    set 1
    ┌───────────────────────────┐            ┌───────────────────────────┐
    │ inputs of step t          │ ─┐      ┌▶ │ inputs of step t+1        │ ─┐
    │ carried rows of step t-1  │ ─┤      ├▶ │ carried rows of step t    │ ─┤
    │ results of step t         │ ◀┤      │  │ results of step t+1       │ ◀┤
    └───────────────────────────┘  │      │  └───────────────────────────┘  │
                                 step t ──┘                             step t+1 ──▶ set 0

The caches, the block per shape, and the optional outputs (logits, hidden) stand once: they don't take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ...files.manifest import Manifest
from .. import step_io
from .buffers import StepLayout, aligned
from .context import Bindings
from .cuda import Cuda, DeviceMemory


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """Tensors of ``each`` bytes one after another: key and value of layer 0, then of layer 1 …"""

    memory: DeviceMemory
    each: int

    def addresses(self, names: list[str], offset: int = 0) -> dict[str, int]:
        """Returns an address in each tensor, ``offset`` bytes behind its beginning."""
        return {name: self.memory.address + index * self.each + offset for index, name in enumerate(names)}


class DeviceState:
    """Caches, the two sets (``per_step[s]`` and ``carried[s]`` are set s), and the buffers that a prefill uses in their place."""

    def __init__(
        self,
        cuda: Cuda,
        manifest: Manifest,
        slots: int,
        rows: int,
        chunk: int,
        weights: Mapping[str, int],
        *,
        takes_head_rows: bool,
    ) -> None:
        """Allocates memory for steps of up to ``rows`` rows over ``slots`` slots and prompt chunks of up to ``chunk`` tokens.

        ``takes_head_rows``: the graph has that input.

        Raises:
            DeviceMemoryError: the memory doesn't fit on the device.
        """
        backbone, heads = manifest.backbone, manifest.heads
        self._cuda, self._weights = cuda, weights
        self._item = np.dtype(manifest.dtype).itemsize
        self._slots, self._layers = slots, backbone.layers
        self._row = (backbone.kv_heads, backbone.head_dim)
        self._cache_rows = manifest.limits.cache_rows
        step = StepLayout.of(slots, rows, rows, heads.num_heads, heads.top_k)
        prompt = StepLayout.of(1, chunk, 1, heads.num_heads, heads.top_k)
        self.caches = self._block(slots * self._cache_rows, "the caches")
        self.carried = [self._block(slots * rows, "carried rows") for _ in range(2)]
        self.per_shape = cuda.allocate(step.per_shape.nbytes, "a step's inputs")
        self.per_step = [cuda.allocate(step.per_step.nbytes, "a step's state") for _ in range(2)]
        self.prefill_carried = self._block(1, "a prefill's inputs")
        self.prefill_new = self._block(chunk, "a prefill's rows")
        self.prefill_per_shape = cuda.allocate(prompt.per_shape.nbytes, "a prefill's inputs")
        self.prefill_per_step = [cuda.allocate(prompt.per_step.nbytes, "a prefill's state") for _ in range(2)]
        sizes = {step_io.LOGITS: backbone.vocab_size, step_io.HIDDEN: backbone.hidden_size}
        self.optional = {name: cuda.allocate(slots * rows * size * self._item, name) for name, size in sizes.items()}
        self._columns = cuda.allocate(8 * self._cache_rows, "column numbers")
        self._takes_head_rows = takes_head_rows

    def write_columns(self, stream: Any) -> None:
        """Writes 0 … S-1 into the input ``columns``. Steps differ only in how many of them they read."""
        memory = self._cuda.pinned(self._columns.nbytes, "column numbers")
        memory.bytes.view(np.int64)[:] = np.arange(self._cache_rows)
        self._cuda.upload(self._columns.address, memory.address, self._columns.nbytes, stream)
        self._cuda.synchronize(stream)
        self._cuda.free(memory)

    def clear(self, slot: int, stream: Any) -> None:
        """Enqueues zeros for the cache of ``slot``. Carried rows stay: a step takes over accepted ones only."""
        nbytes = self._cache_rows * prod(self._row) * self._item
        for index in range(2 * self._layers):
            self._cuda.clear(self.caches.memory.address + index * self.caches.each + slot * nbytes, nbytes, stream)

    def bindings(self, layout: StepLayout, current: int, carried_rows: int, visible: int, head_rows: int) -> Bindings:
        """Returns the bindings of a step on set ``current`` that reads ``visible`` cache rows.

        ``carried_rows``: rows of the step before. ``head_rows``: rows that the heads run at, 0 or 1.
        """
        following, layers = 1 - current, self._layers
        caches = self.caches
        return Bindings(
            self._shapes(layout, carried_rows, visible, head_rows),
            {
                **layout.bindings(self.per_shape.address, self.per_step[current].address, self.per_step[following].address),
                **self.carried[current].addresses(step_io.carried_names(layers)),
                **self.carried[following].addresses(step_io.new_names(layers)),
                **caches.addresses(step_io.past_names(layers)),
                **caches.addresses(step_io.present_names(layers)),
                **self._common(),
            },
        )

    def prefill_bindings(self, layout: StepLayout, slot: int, visible: int, head_rows: int) -> Bindings:
        """Returns the bindings of a prompt chunk for one slot. A prefill neither takes nor leaves carried rows."""
        layers, (first, second) = self._layers, self.prefill_per_step
        offset = slot * self._cache_rows * prod(self._row) * self._item
        return Bindings(
            self._shapes(layout, 1, visible, head_rows),
            {
                **layout.bindings(self.prefill_per_shape.address, first.address, second.address),
                **self.prefill_carried.addresses(step_io.carried_names(layers)),
                **self.prefill_new.addresses(step_io.new_names(layers)),
                **self.caches.addresses(step_io.past_names(layers), offset),
                **self.caches.addresses(step_io.present_names(layers), offset),
                **self._common(),
            },
        )

    def _common(self) -> dict[str, int]:
        optional = {name: memory.address for name, memory in self.optional.items()}
        # The first column number is the row that the heads run at: 0.
        return {**self._weights, **optional, step_io.COLUMNS: self._columns.address, step_io.HEAD_ROWS: self._columns.address}

    def _shapes(self, layout: StepLayout, carried_rows: int, visible: int, head_rows: int) -> dict[str, tuple[int, ...]]:
        kv_heads, head_dim = self._row
        carried = (layout.slots, kv_heads, carried_rows, head_dim)
        past = (layout.slots, kv_heads, self._cache_rows, head_dim)
        return {
            **layout.input_shapes(),
            step_io.COLUMNS: (visible,),
            **({step_io.HEAD_ROWS: (head_rows,)} if self._takes_head_rows else {}),
            **dict.fromkeys(step_io.carried_names(self._layers), carried),
            **dict.fromkeys(step_io.past_names(self._layers), past),
        }

    def _block(self, rows: int, purpose: str) -> TensorBlock:
        each = aligned(rows * prod(self._row) * self._item)
        return TensorBlock(self._cuda.allocate(2 * self._layers * each, purpose), each)
