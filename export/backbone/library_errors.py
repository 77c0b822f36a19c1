"""Says what an exception of transformers means: its first lines with text, and the report that it refers to."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

_LINES = 4
_WIDTH = 240
_REPORT = re.compile(r"above report|report above")
_ROW = re.compile(r"^(\S+)\s*\|\s*(MISMATCH|CONVERSION|MISSING)\s*\|\s*(.*?)\s*$", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LoadReports(logging.Handler):
    """Keeps what transformers logs while it loads a model; nothing is printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Append one message."""
        self.text += _COLOURS.sub("", record.getMessage()) + "\n"


@contextlib.contextmanager
def kept_reports(reports: LoadReports) -> Iterator[None]:
    """Let transformers report to ``reports`` alone."""
    logger = logging.getLogger("transformers")
    handlers, propagated, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [reports], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagated
        logger.setLevel(level)


def cause(error: Exception, reports: LoadReports) -> str:
    """Return the kind of ``error`` and its first lines with text. Lines of a report replace a message that refers to it."""
    message = _COLOURS.sub("", str(error))
    if _REPORT.search(message):
        rows = [f"{name}: {kind.lower()}, {why}" for name, kind, why in _ROW.findall(reports.text)]
        message = "\n".join(rows) or reports.text or message
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" … ({len(lines) - _LINES} more lines)" if len(lines) > _LINES else ""
    said = " ".join(line[:_WIDTH] for line in lines[:_LINES]) + more
    return f"{type(error).__name__}: {said}" if said else f"{type(error).__name__}, without a message"
