"""Reads what ran on the GPU during a step: kernels, and bytes that were copied between host and device."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ATTENTION = re.compile(r"flash|fmha|mha|attention|softmax", re.IGNORECASE)
_MOST = 15


def profiled(work: Callable[[], object]) -> dict[str, Any]:
    """Run ``work`` under torch's profiler, which sees the kernels of all libraries of this process.

    Raises ImportError where there is no torch, and whatever its profiler raises.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder, "trace.json")
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            work()
            torch.cuda.synchronize()
        found.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_bytes()))


def read_trace(trace: dict[str, Any]) -> dict[str, Any]:
    """Sum up a Chrome trace: ``kernels`` by name, longest first, those of ``attention``, and ``copied_bytes`` by direction."""
    calls: dict[str, list[float]] = defaultdict(list)
    copied: dict[str, int] = defaultdict(int)
    for event in trace.get("traceEvents", ()):
        kind, name = event.get("cat"), str(event.get("name"))
        if kind == "kernel":
            calls[name].append(float(event.get("dur", 0)))
        elif kind == "gpu_memcpy":
            direction = next((each for each in ("HtoD", "DtoH", "DtoD") if each in name), name)
            copied[direction] += int(event.get("args", {}).get("bytes", 0))
    kernels = [{"name": name[:160], "calls": len(taken), "us": round(sum(taken), 1)} for name, taken in calls.items()]
    kernels.sort(key=lambda kernel: -float(str(kernel["us"])))
    return {
        "kernel_calls": sum(map(len, calls.values())),
        "kernel_ms": sum(map(sum, calls.values())) / 1e3,
        "kernels": kernels[:_MOST],
        "attention": [kernel for kernel in kernels if _ATTENTION.search(str(kernel["name"]))],
        "copied_bytes": dict(copied),
    }
