"""Interrupts between any two lines of the session's own code."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_OURS = ("medusa_deploy/runtime/loop/", "medusa_deploy/runtime/session.py", "threading.py")


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


@contextmanager
def interrupt_at(place: int = 0) -> Iterator[list[str]]:
    """Raises at the ``place``-th line of the session's own code that this thread runs. Yields the lines that it has run."""
    lines: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not any(part in file for part in _OURS):
            return None
        if linecache.getline(file, frame.f_lineno).lstrip().startswith("with "):
            return trace  # the end of a block counts as its first line, and no interrupt comes before the lock is free again
        lines.append(f"{file}:{frame.f_lineno}")
        if len(lines) == place:
            raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
