"""Shared output of verbs: tables and reports on stdout, progress on stderr, JSON to a file or stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Self, TextIO

STDOUT = "-"


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--json OUT``, which every reporting verb has."""
    parser.add_argument("--json", metavar="OUT", help='write the report as JSON to this file ("-": to stdout, instead of text)')


def positive_int(text: str) -> int:
    """An argparse type: an integer from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """An argparse type: integers from 1, with commas between them."""
    return tuple(positive_int(part) for part in text.split(","))


def names_among(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: names of ``known`` things with commas between them, each once. ``kind``: what one is called."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {kind} {', '.join(unknown)}; known: {', '.join(known)}")
        return list(dict.fromkeys(given))

    return names


def non_negative(text: str) -> float:
    """An argparse type: a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def emit(text: str, report: Mapping[str, Any], destination: str | None) -> None:
    """Print the verb's text on stdout, and write the report where ``--json`` asks for it (``-`` replaces the text)."""
    if destination != STDOUT:
        print(text)
    if destination is not None:
        write_json(report, destination)


def write_json(report: Mapping[str, Any] | Sequence[Any], destination: str | Path) -> None:
    """Write ``report`` to a file, in one piece or not at all; ``-`` is stdout. NaN and infinities become null.

    Raises:
        OutputError: the file system refused.
    """
    to_stdout = str(destination) == STDOUT
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        content = text.encode((to_stdout and sys.stdout.encoding) or "utf-8")
    except UnicodeEncodeError:  # JSON has its own escapes
        text = json.dumps(_plain(report), indent=2, allow_nan=False) + "\n"
        content = text.encode()
    if to_stdout:
        sys.stdout.write(text)
        return
    from ..runtime.files.bundle import write_whole

    write_whole(Path(destination), content)


def _plain(value: Any) -> Any:
    """Turn ``value`` into JSON types; records, paths, tuples and numpy values are known."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(entry) for entry in value]


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Lay out columns as wide as their widest cell, numbers to the right. No trailing newline."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    lines = [list(headers), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    right = [bool(cells) and all(_numeric(row[column]) for row in cells) for column in range(len(headers))]
    lines.insert(1, ["─" * width for width in widths])
    columns = list(zip(widths, right, strict=True))
    return "\n".join("  ".join(map(_pad, line, columns)).rstrip() for line in lines)


def _pad(cell: str, column: tuple[int, bool]) -> str:
    width, right = column
    return cell.rjust(width) if right else cell.ljust(width)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("+-~≤≥ ")[:1].isdigit()


def facts(entries: Mapping[str, object]) -> str:
    """Write one line for each entry, with the names in a column of their own."""
    width = max(len(name) for name in entries)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in entries.items())


def human_bytes(count: float) -> str:
    """Write ``538090408`` as ``513 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def human_seconds(seconds: float) -> str:
    """Write ``3.2 s`` below a minute, ``4:05`` below an hour, ``1:02:03`` above."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def say(text: str) -> None:
    """Print a line to stderr: a warning, or a summary that isn't the result. A stderr that went away doesn't stop the work."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def warn(warnings: Iterable[str]) -> None:
    """Print each warning to stderr, on a line of its own."""
    for warning in warnings:
        say(f"warning: {warning}")


class Progress:
    """Shows one line on a terminal's stderr: the work, how far it is, how fast, and the time left. Elsewhere a line every 30 s.

    ``total`` None: the number of items isn't known. Use it as a context manager. :meth:`phase` starts the next piece of work on a
    line of its own; an instance can be passed where a function ``report(phase)`` is expected.
    """

    _interval = 0.1
    _log_interval = 30.0

    def __init__(self, label: str, total: int | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._label = label
        self._total = total
        self._restart()
        self._line = ""

    def __enter__(self) -> Self:
        self._draw(0, "")
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def __call__(self, phase: str) -> None:
        """See :meth:`phase`."""
        self.phase(phase)

    def phase(self, label: str, total: int | None = None) -> None:
        """Finish the current piece of work and start another."""
        self._finish()
        self._label, self._total = label, total
        self._restart()
        self._draw(0, "")

    def say(self, text: str) -> None:
        """Print a line above the one that is shown."""
        self._write(f"\r\x1b[K{text}\n{self._line}" if self._live else f"{text}\n")

    def _restart(self) -> None:
        self._started = self._logged = time.monotonic()
        self._drawn = -math.inf
        self._first: tuple[int, float] | None = None

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show ``done`` items, at most ten times a second and for the last item.

        The rate counts from the first update, so work that an earlier run had done doesn't flatter it.
        """
        now = time.monotonic()
        self._first = self._first or (done, now)
        self._total = self._total if total is None else total
        if now - self._drawn >= self._interval or done == self._total:
            self._draw(done, note)

    def _draw(self, done: int, note: str) -> None:
        self._drawn = time.monotonic()
        if not self._live:
            if self._drawn - self._logged >= self._log_interval:
                self._logged = self._drawn
                self._write(f"{self._describe(done, note)}\n")
            return
        self._line = self._describe(done, note)
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r{self._line[:width]}\x1b[K")

    def _describe(self, done: int, note: str) -> str:
        parts = [self._label]
        if self._total:
            parts.append(f"{done}/{self._total}")
        elif done:
            parts.append(str(done))
        first, since = self._first or (0, self._drawn)
        if done > first and self._drawn > since:
            rate = (done - first) / (self._drawn - since)
            parts.append(f"{rate:.3g}/s")
            if self._total:
                parts.append(f"ETA {human_seconds((self._total - done) / rate)}")
        return "  ".join([*parts, note] if note else parts)

    def _finish(self) -> None:
        if self._live and self._line:
            width = shutil.get_terminal_size().columns - 1
            took = human_seconds(time.monotonic() - self._started)
            self._write(f"\r{f'{self._label}  {took}'[:width]}\x1b[K\n")
            self._line = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # a terminal that went away must not stop the work
            self._live = False
