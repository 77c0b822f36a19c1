"""Locates the weights that an engine takes as inputs: the bytes of the bundle's files that each of them consists of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

ITEM_BITS = {"float16": 16, "float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "float8_e4m3fn": 8}


class WeightPiece(NamedTuple):
    """``nbytes`` bytes of ``file``, beginning at ``offset``. The file's name is relative to the bundle's folder."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightInput:
    """An input that holds a weight. Its ``pieces`` lie one after another in memory: rows of several matrices of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[WeightPiece, ...]


def parse_weight_inputs(raw: Sequence[Any]) -> tuple[WeightInput, ...]:
    """Reads weight inputs from an engine's record.

    Raises:
        KeyError, TypeError, ValueError: a mistyped field, pieces that don't fill the shape, or two inputs of one name.
    """
    inputs = []
    for entry in raw:
        texts = [entry["name"], *(file for file, _, _ in entry["pieces"])]
        if not all(isinstance(text, str) for text in texts) or set(entry) != set(WeightInput.__dataclass_fields__):
            raise ValueError(f"{entry!r:.80} is no weight input")
        shape = tuple(_size(size) for size in entry["shape"])
        pieces = tuple(WeightPiece(file, _size(offset), _size(nbytes)) for file, offset, nbytes in entry["pieces"])
        wanted = -(-math.prod(shape) * ITEM_BITS[entry["dtype"]] // 8)
        if not pieces or sum(piece.nbytes for piece in pieces) != wanted:
            raise ValueError(f"the pieces of {entry['name']!r} don't have {wanted} bytes")
        for piece in pieces:
            path = PurePosixPath(piece.file)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{entry['name']!r} lies in {piece.file!r}, outside the bundle")
        inputs.append(WeightInput(entry["name"], entry["dtype"], shape, pieces))
    names = [weight.name for weight in inputs]
    if len(set(names)) != len(names):
        raise ValueError("two weight inputs have one name")
    return tuple(inputs)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
