"""Keeps what can be made again in a folder of bounded size, which several processes use at a time.

An entry is a folder. Whoever uses one holds a shared lock on it. An entry that somebody holds stays: its mapped files would
survive the removal, but their room would not become free. Others are removed when they are stale and were unused for a day,
when they were unused for two weeks, and while the cache has more bytes than it may, the least recently used first.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .staging import remove_unlocked

FOLDER_VARIABLE = "MEDUSA_DEPLOY_CACHE"
"""Environment variable that names the cache's folder."""
BYTES_VARIABLE = "MEDUSA_DEPLOY_CACHE_BYTES"
"""Environment variable that says how many bytes the cache may have. Entries in use are never removed."""
DEFAULT_BYTES = 16 << 30

_DAY = 24 * 3600
_STALE_DAYS, _UNUSED_DAYS = 1, 14
_LEFTOVER_SECONDS = 60  # after it was made, a process has surely locked what it works in
_ENTRY = re.compile(r"[0-9a-f]{32}")  # the folder may hold other things, too
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Usage:
    """The state of the cache: its folder, its entries and their bytes, and how many bytes it may have."""

    folder: Path
    entries: int
    nbytes: int
    most: int


def cache_folder() -> Path:
    """The folder of the cache: ``FOLDER_VARIABLE``, or else the user's own folder for caches."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-deploy"


def most_bytes() -> int:
    """How many bytes the cache may have.

    Raises:
        UsageError: ``BYTES_VARIABLE`` isn't a number.
    """
    named = os.environ.get(BYTES_VARIABLE)
    if not named:
        return DEFAULT_BYTES
    if not (named.isascii() and named.isdecimal()) or len(named) > 18:
        raise UsageError(f"{BYTES_VARIABLE} is {named!r:.80}", hint=f"give a number of bytes, such as {DEFAULT_BYTES}")
    return int(named)


def usage() -> Usage:
    """Measure the cache.

    Raises:
        UsageError: ``BYTES_VARIABLE`` isn't a number.
    """
    root = cache_folder()
    entries = [path for path in _inside(root) if _ENTRY.fullmatch(path.name)]
    return Usage(root, len(entries), sum(map(_nbytes, entries)), most_bytes())


def hold(entry: Path) -> int:
    """Make the folder of an entry where it is missing, and hold it. Returns a descriptor: closing it lets the entry go.

    Raises:
        OSError: the folder can't be made.
    """
    while True:
        entry.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed between two of these lines: make it again
            handle = os.open(entry, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: then nothing can be removed, either
                fcntl.flock(handle, fcntl.LOCK_SH)
            try:
                if os.path.samestat(os.fstat(handle), entry.stat()):
                    with suppress(OSError):  # whoever may only read it uses it, too
                        os.utime(entry)
                    return handle
            except OSError:
                os.close(handle)
                raise
            os.close(handle)


def let_go(entry: Path, handle: int) -> None:
    """Give up an entry that ``hold`` returned. An empty one is removed."""
    os.close(handle)
    if not _inside(entry):
        remove_unlocked(entry)


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A folder to make an entry's files in. It goes with the block; what a killed process leaves, :func:`prune` removes."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root, ignore_cleanup_errors=True) as name:
        handle = hold(Path(name))
        try:
            yield Path(name)
        finally:
            os.close(handle)


def prune(root: Path, is_stale: Callable[[Path], bool], *, room: int = 0) -> None:
    """Remove entries as the head of this module says, and what killed processes left half made.

    ``is_stale``: whether an entry can't be of use any more. ``room``: bytes that shall become free on the file system.

    Raises:
        UsageError: ``BYTES_VARIABLE`` isn't a number.
    """
    most, now, kept = most_bytes(), time.time(), list[tuple[float, Path]]()
    for path in _inside(root):
        with suppress(OSError):
            used = path.stat().st_mtime
            days = (now - used) / _DAY
            if path.name.startswith(_PARTIAL):
                if now - used > _LEFTOVER_SECONDS:
                    remove_unlocked(path)
            elif _ENTRY.fullmatch(path.name):
                if days > _UNUSED_DAYS or (days > _STALE_DAYS and is_stale(path)):
                    remove_unlocked(path)
                kept += [(used, path)] if path.exists() else []
    sizes = {path: _nbytes(path) for _, path in kept}
    for _, path in sorted(kept):
        if sum(sizes.values()) <= most and shutil.disk_usage(root).free >= room:
            break
        remove_unlocked(path)
        if not path.exists():
            del sizes[path]


def mount_point(path: Path) -> Path:
    """The root of the file system that holds ``path``."""
    path = path.resolve()
    return next((each for each in (path, *path.parents) if each.is_mount()), path)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _nbytes(entry: Path) -> int:
    total = 0
    for file in _inside(entry):
        with suppress(OSError):
            total += file.stat().st_size
    return total
