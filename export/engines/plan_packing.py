"""Compresses plans that hold no weights: kernels of each layer and profile repeat each other."""

from __future__ import annotations

import lzma
from pathlib import Path

from ...runtime.files.plan_file import SUFFIX, XZ, Compression

_CHUNK = 1 << 20
_PRESET = 1


def pack_plan(path: Path) -> tuple[Path, Compression | None]:
    """Replace the plan ``path`` by a compressed one beside it, if that is smaller. The plan is never in memory as a whole.

    Returns the file that is there now, and how it holds the plan. Equal plans give equal files.

    Raises:
        OSError: the file system refused.
    """
    packed = path.with_name(path.name + SUFFIX)
    # The manifest has the file's sha256: a check sum of its own would be computed for nothing.
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, check=lzma.CHECK_NONE, preset=_PRESET)
    with path.open("rb") as source, packed.open("xb") as target:
        while chunk := source.read(_CHUNK):
            target.write(compressor.compress(chunk))
        target.write(compressor.flush())
    before, after = path.stat().st_size, packed.stat().st_size
    if after >= before:
        packed.unlink()
        return path, None
    path.unlink()
    return packed, Compression(XZ, after, before)
