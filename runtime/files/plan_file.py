"""Plans on disk: as TensorRT wrote them, or compressed, which pays where a plan holds kernels and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import BundleIntegrityError, MissingDependencyError

XZ = "xz"
SUFFIX = ".xz"
MEMORY_LIMIT = 128 << 20
"""Of the decompressor itself: its window, which the file chooses."""
_CHUNK = 1 << 20
_DAMAGED = "don't use this engine: build it again"


@dataclass(frozen=True, slots=True)
class Compression:
    """How a plan's file holds it: ``method`` ``xz``, the file's bytes, and those of the plan in it."""

    method: str
    stored_bytes: int
    plan_bytes: int


def parse_compression(raw: dict[str, Any]) -> dict[str, Compression]:
    """Compressions by file, out of an engine's record.

    Raises:
        KeyError, TypeError, ValueError: an unknown method, or a mistyped or impossible size.
    """
    found = {str(name): Compression(**entry) for name, entry in raw.items()}
    for name, each in found.items():
        sizes = (each.stored_bytes, each.plan_bytes)
        if each.method != XZ or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{name} is compressed as {each}, which this program can't read")
    return found


def plan_bytes(name: str, stored: bytes, compression: Compression | None) -> bytes | bytearray:
    """The plan that the checked bytes of the file ``name`` hold; beside it, no second copy of it is in memory.

    Raises:
        BundleIntegrityError: another size than the record's before or after decompressing, or no sound stream of its method.
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
    plan = bytearray()  # grows by what arrives: a size that the record made up takes no memory
    try:
        while not decompressor.eof:
            piece = source[taken : taken + _CHUNK] if decompressor.needs_input else b""
            if decompressor.needs_input and not piece:
                raise BundleIntegrityError(f"{name} ends after {len(plan)} of the {size} bytes of its plan", hint=_DAMAGED)
            taken += len(piece)
            # One byte more than fits is asked for at the end: a file that holds more gives itself away before it is unpacked.
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
