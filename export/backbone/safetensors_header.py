"""Reads the header of a safetensors file, and checks every number in it against the file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import CheckpointError, UnlinkableError

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
# NumPy has no bfloat16: its bits are read as uint16. Other types aren't read as numbers here.
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_DAMAGED = "the file is damaged or truncated: download or copy it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor inside a file: ``nbytes`` bytes from ``offset`` on, row by row. ``dtype`` is safetensors' name (``F16``)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def mapped(self) -> np.ndarray:
        """Map the numbers without reading them; bfloat16 as its bits in uint16. Writes never reach the file."""
        dtype = np.dtype(_NUMPY[self.dtype])
        return np.memmap(self.file, dtype, mode="c", offset=self.offset, shape=self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the places of a safetensors file's tensors by name. Refuses types that :data:`ITEM_BYTES` doesn't know.

    Raises:
        CheckpointError: no such file, or a header that breaks a rule of the format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} says that its header has {length} bytes; the file has {size}, the limit is {MAX_HEADER_BYTES}",
                    hint=_DAMAGED,
                )
            raw = json.loads(file.read(length))
    except OSError as error:
        hint = "the checkpoint is incomplete: copy it again"
        raise CheckpointError(f"{path} can't be read: {error.strerror}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is no JSON: {error}", hint=_DAMAGED) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"the header of {path} is a {type(raw).__name__}, not an object", hint=_DAMAGED)
    start = 8 + length
    tensors = {name: _stored(path, name, entry, start, size) for name, entry in raw.items() if name != "__metadata__"}
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise CheckpointError(f"{tensor.name} in {path} starts at byte {tensor.offset}, expected {end}", hint=_DAMAGED)
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes; its tensors end at {end}", hint=_DAMAGED)
    return tensors


def _stored(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        sizes = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
        valid = isinstance(dtype, str) and sizes
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path} describes {name!r} as {str(entry)[:100]}", hint=_DAMAGED)
    if dtype not in ITEM_BYTES:
        raise UnlinkableError(
            f"{name} in {path} is {dtype!r}, a type that isn't known here",
            hint="export with --weights copied, or give the checkpoint in float16, bfloat16 or float32",
        )
    if not begin <= end <= size - start or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{name} in {path}: {dtype} {list(shape)} can't lie at bytes {begin} to {end} of {size - start}", hint=_DAMAGED
        )
    return StoredTensor(name, path, dtype, shape, start + begin, end - begin)


def header_bytes(entries: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Write the header, its length in front, of a file that holds ``entries`` (name to type and shape) one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
