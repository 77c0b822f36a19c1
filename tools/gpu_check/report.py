"""Keeps a stage's findings, on disk after every entry, and watches its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..console import write_json


class OutOfTimeError(Exception):
    """The stage's time is up; its report keeps what was found."""


class Report:
    """A stage's findings.

    ``results``: name to entry. ``skipped``: name to the reason why it wasn't measured. ``wrong``: name of a result that is not
    what it must be, and how.
    """

    def __init__(self, path: Path | None, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seconds = seconds
        self._start = clock()
        self.results: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self.status = "running"
        self.error: dict[str, str] | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._start + self._seconds - self._clock()

    def check_time(self, needed: float = 0.0) -> None:
        """Stop before work that takes about ``needed`` seconds, if these aren't left.

        Raises:
            OutOfTimeError: the deadline is nearer than that.
        """
        if self.seconds_left < needed:
            raise OutOfTimeError(f"{self.seconds_left:.0f} s are left, {needed:.0f} s are needed")

    def put(self, name: str, entry: Any) -> None:
        """Keep an entry, whatever happens next."""
        self.results[name] = entry
        self.save()

    def skip(self, name: str, reason: BaseException | str) -> None:
        """Record why an entry is missing."""
        self.skipped[name] = reason if isinstance(reason, str) else describe(reason)
        self.save()

    def save(self) -> None:
        """Write the report, if it has a place."""
        if self._path is not None:
            write_json(self.to_json(), self._path)

    def to_json(self) -> dict[str, Any]:
        """The stage's entry in ``gpu_check.json``."""
        return {
            "status": self.status,
            "seconds": round(self._clock() - self._start, 1),
            "error": self.error,
            "skipped": self.skipped,
            "wrong": self.wrong,
            "results": self.results,
        }


def describe(error: BaseException) -> str:
    """Write class, message and hint of an error on one line."""
    text = f"{type(error).__name__}: {getattr(error, 'message', None) or error}"
    hint = getattr(error, "hint", "")
    return " ".join((f"{text} ({hint})" if hint else text).split())[:600]
