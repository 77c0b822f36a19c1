"""Facts about this machine, read from the kernel.

Needs the standard library only, so that doctor runs where nothing is installed.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Kernels of an inference engine choose by these.
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def measured_on() -> dict[str, Any]:
    """Date, processor and cores: the first entries of every report of a measurement."""
    return {"date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "cpu": cpu_model(), "cores": available_cores()}


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    return _cpuinfo("model name", "Model", "cpu model") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets of ``CPU_FEATURES`` that this processor has."""
    flags = set(_cpuinfo("flags", "Features").split())
    return [name for name in CPU_FEATURES if name in flags]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time that a container allows; None without a limit."""
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.strip().isdigit() else None


def memory_bytes() -> tuple[int, int]:
    """Total and available memory in bytes, with a container's limit; 0 where it isn't known."""
    lines = (line.partition(":") for line in _read(_MEMINFO).splitlines())
    kib = {name: int(rest.split()[0]) for name, _, rest in lines if rest.split()}
    total, available = kib.get("MemTotal", 0) << 10, kib.get("MemAvailable", 0) << 10
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit) - int(used))
    return total, available


def _cpuinfo(*names: str) -> str:
    """Value of the first line whose name is one of ``names``, or an empty string."""
    for line in _read(_CPUINFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names and value.strip():
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
