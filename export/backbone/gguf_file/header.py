"""Reads the header of a GGUF file and checks every number in it against the file.

A header is a magic word, a version, counts, then fields (name, type, value) and tensors (name, sizes, type, offset). Numbers are
little-endian. The gguf package reads headers, too, at some ten seconds for a vocabulary of usual size.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime.errors import CheckpointError

_AGAIN = "download or copy the file again, or convert the model again"
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_AXES = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: ``shape`` with its rows first, ``kind`` by ggml's number, bytes from ``offset`` on."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class HeaderReader:
    """Reads values one after another. Raises CheckpointError where the file ends before its header does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read: {error}", hint=_AGAIN) from error
        self.at = 0

    def fail(self, what: str) -> CheckpointError:
        """Make the error of a header that isn't right."""
        return CheckpointError(f"{self.path} can't be read: {what}", hint=_AGAIN)

    def take(self, count: int) -> int:
        """Step over ``count`` bytes and return where they begin."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.fail(f"its header goes on to byte {self.at}, the file has {len(self.data)}")
        return begin

    def whole(self, layout: str) -> int:
        """Read one whole number of a layout of :mod:`struct`."""
        (value,) = struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))
        return int(value)

    def text(self) -> str:
        """Read a text in UTF-8, its length in front."""
        count = self.whole("<Q")
        begin = self.take(count)
        try:
            return self.data[begin : begin + count].decode()
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {begin} isn't UTF-8") from None

    def value(self, kind: int) -> Any:
        """Read a field's value."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.whole("<I"), self.whole("<Q")
            if inner == _TEXT:
                if 8 * count > len(self.data):
                    raise self.fail(f"a list of {count} texts can't be in {len(self.data)} bytes")
                return [self.text() for _ in range(count)]
            return self._numbers(inner, count).tolist()
        return self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise self.fail(f"a value at byte {self.at} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.data, dtype, count, self.take(dtype.itemsize * count))


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor], mmap.mmap]:
    """Read all fields, the places of all tensors, and the bytes of the file.

    Raises:
        CheckpointError: no GGUF file, another version, or a header that contradicts the file.
    """
    from gguf.constants import GGML_QUANT_SIZES

    reader = HeaderReader(path)
    if reader.data[: reader.take(4) + 4] != b"GGUF":
        raise reader.fail("it doesn't begin with GGUF")
    version = reader.whole("<I")
    if version not in _VERSIONS:
        raise reader.fail(f"it has version {version}, or big-endian numbers; versions 2 and 3 in little-endian are read")
    tensor_count, field_count = reader.whole("<Q"), reader.whole("<Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = reader.text()
        if name in fields:
            raise reader.fail(f"it has two fields {name}")
        fields[name] = reader.value(reader.whole("<I"))
    found: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name, axes = reader.text(), reader.whole("<I")
        if name in found or axes > _MAX_AXES:
            raise reader.fail(f"{name} has {axes} axes, or is there twice")
        sizes = tuple(reader.whole("<Q") for _ in range(axes))
        found[name] = GgufTensor(sizes[::-1], reader.whole("<I"), reader.whole("<Q"))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1:
        raise reader.fail(f"general.alignment is {alignment!r:.40}")
    start = reader.at + -reader.at % alignment
    tensors = {name: GgufTensor(tensor.shape, tensor.kind, start + tensor.offset) for name, tensor in found.items()}
    for name, tensor in tensors.items():
        block, size = GGML_QUANT_SIZES.get(tensor.kind, (1, 0))  # type: ignore[call-overload]
        end = tensor.offset + math.prod(tensor.shape) // block * size
        if end > len(reader.data):
            raise reader.fail(f"{name} ends at byte {end}, the file has {len(reader.data)}")
    return fields, tensors, reader.data
