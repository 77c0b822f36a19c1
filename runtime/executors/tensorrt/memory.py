"""All device memory that steps use, allocated once, and the addresses that a step's tensors have in it."""

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
    """Equal tensors one after another: key and value of layer 0, then of layer 1 …"""

    memory: DeviceMemory
    each: int

    def addresses(self, names: list[str], offset: int = 0) -> dict[str, int]:
        """Address of each tensor, ``offset`` bytes into it."""
        return {name: self.memory.address + index * self.each + offset for index, name in enumerate(names)}


class DeviceState:
    """Caches, two sets of moving parts and carried rows, and what a prefill uses in their place.

    ``moving[s]`` and ``carried[s]`` are set s. A step on set s reads both, and writes the next step's inputs and its own new rows
    into the other set.
    """

    def __init__(self, cuda: Cuda, manifest: Manifest, slots: int, rows: int, chunk: int, weights: Mapping[str, int]) -> None:
        """For steps of up to ``rows`` rows over ``slots`` slots and prompts in pieces of up to ``chunk`` tokens.

        Raises:
            DeviceMemoryError: it doesn't fit.
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
        self.fixed = cuda.allocate(step.fixed.nbytes, "a step's inputs")
        self.moving = [cuda.allocate(step.moving.nbytes, "a step's state") for _ in range(2)]
        self.prefill_carried = self._block(1, "a prefill's inputs")
        self.prefill_new = self._block(chunk, "a prefill's rows")
        self.prefill_fixed = cuda.allocate(prompt.fixed.nbytes, "a prefill's inputs")
        self.prefill_moving = [cuda.allocate(prompt.moving.nbytes, "a prefill's state") for _ in range(2)]
        sizes = {step_io.LOGITS: backbone.vocab_size, step_io.HIDDEN: backbone.hidden_size}
        self.optional = {name: cuda.allocate(slots * rows * size * self._item, name) for name, size in sizes.items()}
        self._columns = cuda.allocate(8 * self._cache_rows, "column numbers")

    def write_columns(self, stream: Any) -> None:
        """Put 0 … S-1 into the input ``columns``, whose length alone varies."""
        memory = self._cuda.pinned(self._columns.nbytes, "column numbers")
        memory.bytes.view(np.int64)[:] = np.arange(self._cache_rows)
        self._cuda.upload(self._columns.address, memory.address, self._columns.nbytes, stream)
        self._cuda.synchronize(stream)
        self._cuda.free(memory)

    def bindings(self, layout: StepLayout, now: int, carried_rows: int, visible: int) -> Bindings:
        """A step on set ``now``, after one of ``carried_rows`` rows, that looks at ``visible`` cache rows."""
        then, layers = 1 - now, self._layers
        caches = self.caches
        return Bindings(
            self._shapes(layout, carried_rows, visible),
            {
                **layout.bindings(self.fixed.address, self.moving[now].address, self.moving[then].address),
                **self.carried[now].addresses(step_io.carried_names(layers)),
                **self.carried[then].addresses(step_io.new_names(layers)),
                **caches.addresses(step_io.past_names(layers)),
                **caches.addresses(step_io.present_names(layers)),
                **self._common(),
            },
        )

    def prefill_bindings(self, layout: StepLayout, slot: int, visible: int) -> Bindings:
        """A piece of a prompt for one slot. Nothing is carried into it or out of it."""
        layers, (first, second) = self._layers, self.prefill_moving
        offset = slot * self._cache_rows * prod(self._row) * self._item
        return Bindings(
            self._shapes(layout, 1, visible),
            {
                **layout.bindings(self.prefill_fixed.address, first.address, second.address),
                **self.prefill_carried.addresses(step_io.carried_names(layers)),
                **self.prefill_new.addresses(step_io.new_names(layers)),
                **self.caches.addresses(step_io.past_names(layers), offset),
                **self.caches.addresses(step_io.present_names(layers), offset),
                **self._common(),
            },
        )

    def _common(self) -> dict[str, int]:
        optional = {name: memory.address for name, memory in self.optional.items()}
        return {**self._weights, **optional, step_io.COLUMNS: self._columns.address}

    def _shapes(self, layout: StepLayout, carried_rows: int, visible: int) -> dict[str, tuple[int, ...]]:
        kv_heads, head_dim = self._row
        carried = (layout.slots, kv_heads, carried_rows, head_dim)
        past = (layout.slots, kv_heads, self._cache_rows, head_dim)
        return {
            **layout.input_shapes(),
            step_io.COLUMNS: (visible,),
            **dict.fromkeys(step_io.carried_names(self._layers), carried),
            **dict.fromkeys(step_io.past_names(self._layers), past),
        }

    def _block(self, rows: int, purpose: str) -> TensorBlock:
        each = aligned(rows * prod(self._row) * self._item)
        return TensorBlock(self._cuda.allocate(2 * self._layers * each, purpose), each)
