"""Puts large heads into a file of the bundle, so that none of their matrices has to be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ...runtime.files.heads import HeadSet
from ..backbone.checkpoint import STORED_DTYPES, write_tensors
from ..backbone.safetensors_header import StoredTensor, read_header

HEADS_FILE = "medusa-heads.safetensors"
LINKED_BYTES = 64 << 20
"""Heads of fewer bytes stay in memory."""
_SMALLEST = 1 << 16
_NUMBERS_AT_A_TIME = 1 << 22


@dataclass(frozen=True, slots=True)
class LinkedHeads:
    """Heads whose large matrices are mapped from ``HEADS_FILE``. ``places``: of each by the address that it is mapped to."""

    heads: HeadSet
    places: Mapping[int, StoredTensor]


def link_heads(heads: HeadSet, dtype: torch.dtype, folder: Path) -> LinkedHeads:
    """Write the large matrices of ``heads`` to a file in ``folder``, as ``dtype``, and map them. Small heads stay as they are.

    Raises:
        CheckpointError: values that overflow in ``dtype``.
        OSError: the file can't be written.
    """
    large = {name: array for name, array in heads.tensors.items() if array.dtype.kind == "f" and array.size >= _SMALLEST}
    if sum(array.size for array in large.values()) * dtype.itemsize < LINKED_BYTES:
        return LinkedHeads(heads, {})
    target = folder / HEADS_FILE
    write_tensors(target, STORED_DTYPES[dtype], {name: (array.shape, _pieces(array)) for name, array in large.items()})
    stored = read_header(target)
    mapped = {name: stored[name].mapped() for name in large}
    places = {array.ctypes.data: stored[name] for name, array in mapped.items()}
    small = {name: array.copy() for name, array in heads.tensors.items() if name not in large}  # views keep a whole file mapped
    return LinkedHeads(replace(heads, tensors={**small, **mapped}), places)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _NUMBERS_AT_A_TIME // array[0].size)
    return (array[at : at + rows] for at in range(0, len(array), rows))
