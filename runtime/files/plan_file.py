"""Reads plans from disk. A plan is stored as TensorRT wrote it, or compressed: that pays if it holds kernels and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BundleIntegrityError, MissingDependencyError
from .json_file import record

XZ = "xz"
SUFFIX = ".xz"
MEMORY_LIMIT = 128 << 20
"""Limit for the decompressor's own memory: the file chooses the size of its window."""
_CHUNK = 1 << 20
_DAMAGED = "don't use this engine: build it again"


@dataclass(frozen=True, slots=True)
class Compression:
    """Compression of a plan's file: the ``method`` (``xz``), bytes of the file, bytes of the plan in it."""

    method: str
    stored_bytes: int
    plan_bytes: int


def parse_compression(raw: dict[str, Any]) -> dict[str, Compression]:
    """Reads the compression of each file from an engine's record.

    Raises:
        KeyError, TypeError, ValueError: a method is unknown, or a size is mistyped or impossible.
    """
    found = {name: record(Compression, entry) for name, entry in raw.items()}
    for name, each in found.items():
        sizes = (each.stored_bytes, each.plan_bytes)
        if each.method != XZ or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{name} is compressed as {each}, which this program can't read")
    return found


def plan_bytes(name: str, stored: bytes, compression: Compression | None) -> bytes | bytearray:
    """Returns the plan in ``stored``, the checked bytes of the file ``name``. Memory never holds a second copy of the plan.

    Raises:
        BundleIntegrityError: a size before or after decompressing isn't the record's, or the stream is damaged.
        MissingDependencyError: this Python was built without lzma.
    """
    if compression is None:
        return stored
    if len(stored) != compression.stored_bytes:
        raise BundleIntegrityError(
            f"{name} has {len(stored)} bytes, the engine's record says {compression.stored_bytes}", hint=_DAMAGED
        )
    try:
        import lzma
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is compressed, and this Python can't read it: {error}", hint="use a Python with its module lzma"
        ) from None
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_LIMIT)
    source, size, taken = memoryview(stored), compression.plan_bytes, 0
    plan = bytearray()  # grows with the data: a size that the record made up takes no memory
    try:
        while not decompressor.eof:
            piece = source[taken : taken + _CHUNK] if decompressor.needs_input else b""
            if decompressor.needs_input and not piece:
                raise BundleIntegrityError(f"{name} ends after {len(plan)} of the {size} bytes of its plan", hint=_DAMAGED)
            taken += len(piece)
            # At the end this asks for one byte more than fits: a file that holds more is noticed before it is unpacked.
            plan += decompressor.decompress(piece, min(_CHUNK, size - len(plan) + 1))
            if len(plan) > size:
                raise BundleIntegrityError(
                    f"{name} holds more than the {size} bytes that the engine's record says", hint=_DAMAGED
                )
    except lzma.LZMAError as error:
        raise BundleIntegrityError(f"{name} can't be decompressed: {error}", hint=_DAMAGED) from None
    except MemoryError:
        raise BundleIntegrityError(
            f"there is no memory for the plan of {size} bytes in {name}", hint="load it on a machine with more memory"
        ) from None
    behind = len(decompressor.unused_data) + len(source) - taken
    if len(plan) != size or behind:
        raise BundleIntegrityError(
            f"{name} holds a plan of {len(plan)} bytes and {behind} bytes behind it, the engine's record says {size} and none",
            hint=_DAMAGED,
        )
    return plan
