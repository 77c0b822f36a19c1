"""Keeps the kernels that TensorRT-RTX compiles on the device in a file beside the engine, so that later loads need not wait.

The file's first line says what the kernels belong to: the plan, the GPU, the driver and TensorRT's version. A file of anything
else is ignored, and so is a damaged one. TensorRT checks its own part again. A cache saves time and is never needed: what can't
be written is a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 30
_MAX_HEADER = 4096


class RuntimeCache:
    """One engine's file. ``state``: ``empty``, ``loaded``, ``foreign`` or ``damaged``, as it was found."""

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        """``key``: what the kernels belong to, by name. The file's name depends on it."""
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"runtime-{digest}.cache"
        self.state = "empty"
        self._kept = b""

    def fill(self, cache: Any) -> None:
        """Give ``cache``, which TensorRT made, the kernels of the file, if they are for this machine."""
        blob = self._read()
        if blob is not None:
            self.state = "loaded" if cache.deserialize(blob) else "foreign"
            self._kept = blob if self.state == "loaded" else b""

    def save(self, cache: Any) -> bool:
        """Write what ``cache`` holds now, whole or not at all. Returns False if it is in the file, or can't be written."""
        made = cache.serialize()
        blob = b"" if made is None else bytes(memoryview(made))
        if not blob or blob == self._kept or len(blob) > _MAX_BYTES:
            return False
        header = json.dumps({"key": self._key, "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}).encode()
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{self.path.name}.", dir=self.path.parent, delete=False) as file:
                temporary = Path(file.name)
                try:
                    file.write(header + b"\n" + blob)
                    file.flush()
                    os.fsync(file.fileno())
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"no runtime cache: can't write {self.path}: {error.strerror}", RuntimeWarning, stacklevel=2)
            return False
        self._kept = blob
        return True

    def _read(self) -> bytes | None:
        try:
            if self.path.is_symlink() or self.path.stat().st_size > _MAX_BYTES + _MAX_HEADER:
                self.state = "foreign"
                return None
            content = self.path.read_bytes()
        except OSError:
            return None
        line, _, blob = content.partition(b"\n")
        try:
            header = json.loads(line) if len(line) <= _MAX_HEADER else None
            known = header["key"] == self._key  # type: ignore[index]
            whole = header["bytes"] == len(blob) and header["sha256"] == hashlib.sha256(blob).hexdigest()  # type: ignore[index]
        except (ValueError, TypeError, KeyError, RecursionError):
            known, whole = True, False
        if not known or not whole:
            self.state = "damaged" if known else "foreign"
            return None
        return blob
