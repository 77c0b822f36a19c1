"""Times work on a device: with CUDA graphs and events, or with the same calls on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from ....runtime.errors import DeviceError

_WARMUPS = 3
Work = Callable[[], Any]


class Clock:
    """Captures and times work on ``device`` (cuda or cpu)."""

    def __init__(self, device: str) -> None:
        """Raises DeviceError where torch sees no GPU."""
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"torch {torch.__version__} sees no GPU", hint="--device cpu tries the tool itself")
        self.device = device
        self.is_cuda = device == "cuda"
        # One stream for warm-ups and captures: workspaces of libraries belong to a stream, and are made while warming up.
        self._side: Any = torch.cuda.Stream() if self.is_cuda else None  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def event(self) -> Any:
        """A mark in the device's work that knows when it was passed."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def captured(self, work: Work) -> Work:
        """Capture ``work`` as one CUDA graph after a few ordinary runs. On a CPU it is ``work`` itself, after one run."""
        if not self.is_cuda:
            work()
            return work
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(_WARMUPS):
                work()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            work()
        return graph.replay

    def milliseconds(self, work: Work, repeats: int, before: Work = lambda: None) -> list[float]:
        """Time each of ``repeats`` runs, without ``before``. A GPU is timed by events, without waiting in between."""
        if not self.is_cuda:
            times = []
            for _ in range(repeats):
                before()
                started = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - started))
            return times
        pairs = [(self.event(), self.event()) for _ in range(repeats)]
        for first, last in pairs:
            before()
            first.record()
            work()
            last.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(last) for first, last in pairs]

    def measure(self, work: Work, repeats: int, before: Work = lambda: None) -> dict[str, Any]:
        """Median and spread of :meth:`milliseconds`. A first run isn't counted."""
        times = self.milliseconds(work, repeats + 1, before)[1:]
        cuts = quantiles(times, n=10) if len(times) > 1 else times * 9
        return {"ms": median(times), "ms_p10": cuts[0], "ms_p90": cuts[-1], "repeats": repeats}

    def bandwidth(self) -> dict[str, float]:
        """GB/s of device memory: a copy counts bytes read and written, a sum over float32 counts bytes read."""
        count = (1 << 28) if self.is_cuda else (1 << 22)
        source = torch.ones(count, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        size = source.numel() * source.element_size()
        copied = self.measure(lambda: target.copy_(source), 10)["ms"]
        read = self.measure(source.sum, 10)["ms"]
        return {"copy_gb_s": 2 * size / copied / 1e6, "read_gb_s": size / read / 1e6}
