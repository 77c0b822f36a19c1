"""Runs the heads alone on TensorRT, at rows that the host accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...files.manifest import Manifest
from .. import step_io
from .buffers import Layout
from .context import Bindings, Contexts
from .cuda import Cuda
from .engine import Engine


class TrtHeads:
    """Computes the candidates of up to ``slots`` rows from their hidden states and root tokens.

    ``seconds``: device time of the newest call, without the steps before it in the stream.
    """

    def __init__(
        self, cuda: Cuda, stream: Any, manifest: Manifest, engine: Engine, slots: int, weights: Mapping[str, int]
    ) -> None:
        """Allocates the buffers.

        Raises:
            DeviceMemoryError: the buffers don't fit on the device.
        """
        self._cuda, self._stream, self._weights = cuda, stream, weights
        self._contexts = Contexts(cuda, stream, engine, graphs=False)
        self._manifest = manifest
        layout = self._layout(slots)[0]
        self._device = cuda.allocate(layout.nbytes, "the heads' inputs and results")
        self._host = cuda.pinned(layout.nbytes, "the heads' inputs and results")
        self._start, self._end = cuda.event(), cuda.event()
        self.seconds = 0.0

    def _layout(self, count: int) -> tuple[Layout, int]:
        """Returns the layout for ``count`` rows, and the bytes of its inputs, which come first."""
        facts, backbone = self._manifest.heads, self._manifest.backbone
        inputs = [
            (step_io.ROOT_HIDDEN, self._manifest.dtype, (count, backbone.hidden_size)),
            (step_io.ROOT_TOKEN, "int64", (count,)),
        ]
        shape = (count, facts.num_heads, facts.top_k)
        results = [(step_io.CANDIDATES, "int64", shape), (step_io.LOG_PROBS, "float32", shape)]
        return Layout.of([*inputs, *results]), Layout.of(inputs).nbytes

    def __call__(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes hidden [b, H] and root int64 [b]. Waits; returns candidates int64 [b, K, k] and log_probs float32 [b, K, k]."""
        layout, split = self._layout(len(root))
        views = layout.views(self._host.bytes)
        views[step_io.ROOT_HIDDEN][:] = hidden
        views[step_io.ROOT_TOKEN][:] = root
        shapes = {name: layout.shapes()[name] for name in (step_io.ROOT_HIDDEN, step_io.ROOT_TOKEN)}
        addresses = {**self._weights, **layout.addresses(self._device.address)}
        self._cuda.record(self._start, self._stream)
        self._cuda.upload(self._device.address, self._host.address, split, self._stream)
        self._contexts.enqueue(0, None, lambda: Bindings(shapes, addresses))
        self._cuda.download(self._host.address + split, self._device.address + split, layout.nbytes - split, self._stream)
        self._cuda.record(self._end, self._stream)
        self._cuda.wait(self._end)
        self.seconds = self._cuda.seconds_between(self._start, self._end)
        return views[step_io.CANDIDATES].copy(), views[step_io.LOG_PROBS].copy()
