"""Tells the two kinds of reports apart that figures are drawn from: those of ``bench`` and those of ``gpu_check``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_REPORT_BYTES = 64 << 20


def is_gpu_check(report: Any) -> bool:
    """Tell a report of ``gpu_check`` from one of ``bench``."""
    return isinstance(report, Mapping) and isinstance(report.get("stages"), Mapping)
