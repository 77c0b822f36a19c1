"""Says which host and which GPU a report is about."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

from ..machine import measured_on, memory_bytes

_QUERY = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def machine_facts() -> dict[str, Any]:
    """Describe host and GPU; no package is needed."""
    return {
        **measured_on(),
        "memory_bytes": memory_bytes()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpu": gpu_facts(),
    }


def gpu_facts() -> list[dict[str, str]]:
    """Ask nvidia-smi about each GPU. The list is empty where there is no nvidia-smi or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(_QUERY.split(","), (cell.strip() for cell in line.split(",")), strict=False)) for line in said.splitlines()]
