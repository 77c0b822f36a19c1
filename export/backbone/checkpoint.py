"""Finds the tensors of a folder of safetensors, and brings its shards into a bundle."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...runtime.errors import CheckpointError, UnlinkableError
from ...runtime.files.json_file import read_json_file
from .safetensors_header import StoredTensor, header_bytes, read_header

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_INDEX_BYTES = 64 << 20
_NUMPY: dict[str, type] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16"}
_CHUNK = 1 << 19  # numbers that are checked or converted at a time: they stay in the processor's cache
# By type: an unsigned integer of its size, the mask of all bits but the sign, and the smallest magnitude that isn't finite.
_BITS = {"F16": (np.uint16, 0x7FFF, 0x7C00), "BF16": (np.uint16, 0x7FFF, 0x7F80), "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
         "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)}  # fmt: skip
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Placed:
    """Shards in a bundle: ``tensors`` by name, and how each file came there (``hard link``, ``copy``, ``converted``)."""

    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, str]


def find_stored(folder: Path) -> dict[str, StoredTensor]:
    """Find all tensors of a model folder by ``model.safetensors`` or ``model.safetensors.index.json``. Reads headers alone.

    Where both are there the single file counts, as in transformers: an index of older shards may be left beside it.

    Raises:
        UnlinkableError: no safetensors.
        CheckpointError: an index that leads out of the folder, a shard that is missing or damaged, or one
            that doesn't hold what the index says.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        if not os.path.lexists(folder / _SINGLE):
            raise UnlinkableError(
                f"{folder} has neither {_INDEX} nor {_SINGLE}", hint="linked weights need a folder of safetensors"
            )
        return read_header(folder / _SINGLE)
    raw = read_json_file(index, limit=_MAX_INDEX_BYTES, error=CheckpointError, hint="download the index again")
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files", hint="download the index again")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file or "\\" in file or file in ("", "..")]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which isn't a file of its folder", hint="don't use this checkpoint")
    shards = {file: read_header(folder / file) for file in files}
    absent = [(name, file) for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        name, file = absent[0]
        raise CheckpointError(f"{index.name} says that {file} holds {name}, and it doesn't", hint="copy the whole folder again")
    return {name: shards[file][name] for name, file in weight_map.items()}


def place(needed: Mapping[str, StoredTensor], dtype: torch.dtype, folder: Path, report: Report) -> Placed:
    """Bring the files that hold ``needed`` into ``folder``, and return the places of the tensors there.

    A file whose tensors have ``dtype`` becomes a hard link, or a copy where the file system has no hard links. From any other
    file, the needed tensors are converted. Values are checked a chunk at a time.

    Raises:
        UnlinkableError: a tensor that isn't floating point.
        CheckpointError: NaN or infinite values, or values that overflow in ``dtype``.
        OSError: the file system refused.
    """
    wanted = STORED_DTYPES[dtype]
    shards = _by_file(needed.values())
    placed: dict[str, StoredTensor] = {}
    files = {}
    for number, (source, tensors) in enumerate(sorted(shards.items()), 1):
        target = folder / source.name
        step = f"{source.name} ({number} of {len(shards)})"
        if _stays(tensors, wanted):
            report(f"checking {step}")
            for tensor in tensors:
                _check_finite(tensor)
            files[source.name] = _link(source, target, lambda step=step: report(f"copying {step}"))  # type: ignore[misc]
        else:
            report(f"converting {step}")
            _convert(tensors, wanted, target)
            files[source.name] = f"converted to {wanted}"
        names = {tensor.name for tensor in tensors}
        placed.update((name, tensor) for name, tensor in read_header(target).items() if name in names)
    return Placed(placed, files)


def placed_bytes(needed: Iterable[StoredTensor], dtype: torch.dtype) -> int:
    """Count the bytes of the files that :func:`place` brings into a bundle, but for the headers of those that it converts.

    Raises:
        UnlinkableError: a tensor that isn't floating point.
    """
    wanted = STORED_DTYPES[dtype]
    return sum(
        source.stat().st_size if _stays(tensors, wanted) else sum(math.prod(each.shape) * dtype.itemsize for each in tensors)
        for source, tensors in _by_file(needed).items()
    )


def _by_file(tensors: Iterable[StoredTensor]) -> dict[Path, list[StoredTensor]]:
    shards: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        if tensor.dtype not in _BITS:
            raise UnlinkableError(f"{tensor.name} is {tensor.dtype}, not floating point", hint="export with --weights copied")
        shards.setdefault(tensor.file, []).append(tensor)
    return shards


def _stays(tensors: list[StoredTensor], wanted: str) -> bool:
    """True if a file can become the bundle's as it is."""
    return all(tensor.dtype == wanted and tensor.offset % np.dtype(np.float32).itemsize == 0 for tensor in tensors)


def _link(source: Path, target: Path, copying: Callable[[], None]) -> str:
    source = source.resolve()  # a hub's cache holds links to the files
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        copying()
        shutil.copyfile(source, target)
        return "copy"
    return "hard link"


def _check_finite(tensor: StoredTensor) -> None:
    if not all(_finite(bits, tensor.dtype) for bits in _chunks(tensor)):
        raise CheckpointError(f"{tensor.name} holds NaN or infinite values", hint="the checkpoint is damaged")


def _convert(tensors: list[StoredTensor], wanted: str, target: Path) -> None:
    def pieces(tensor: StoredTensor) -> Iterator[np.ndarray]:
        return (_numbers(bits, tensor.dtype) for bits in _chunks(tensor))

    write_tensors(target, wanted, {tensor.name: (tensor.shape, pieces(tensor)) for tensor in tensors})


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Turn bits into numbers. NumPy has no bfloat16, whose bits are the upper half of a float32's."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits.view(_NUMPY[dtype])


def write_tensors(target: Path, wanted: str, tensors: Mapping[str, tuple[tuple[int, ...], Iterable[np.ndarray]]]) -> None:
    """Write a file of safetensors of the type ``wanted`` (``F32``, ``F16``), a piece at a time.

    ``tensors``: by name a shape, and pieces of the numbers in order. They are asked for one by one. All is NumPy on one thread:
    on a busy machine torch's threads wait for each other longer than they compute.

    Raises:
        CheckpointError: values that aren't finite as ``wanted``.
        OSError: the file can't be written.
    """
    with target.open("xb") as file:
        file.write(header_bytes({name: (wanted, shape) for name, (shape, _) in tensors.items()}))
        for name, (_, pieces) in tensors.items():
            for piece in pieces:
                with np.errstate(over="ignore"):
                    converted: np.ndarray = np.ascontiguousarray(piece, _NUMPY[wanted])
                if not _finite(converted.view(_BITS[wanted][0]), wanted):
                    raise CheckpointError(
                        f"{name} holds NaN or infinite values as {wanted}",
                        hint="the checkpoint is damaged, or overflows in this --dtype",
                    )
                file.write(converted.data)


def _finite(bits: np.ndarray, dtype: str) -> bool:
    _, magnitude, infinite = _BITS[dtype]
    return bool((bits & magnitude).max(initial=0) < infinite)


def _chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Read the bits in pieces, as unsigned integers; nothing of the file stays mapped."""
    dtype = np.dtype(_BITS[tensor.dtype][0])
    count = tensor.nbytes // dtype.itemsize
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        for first in range(0, count, _CHUNK):
            yield np.fromfile(file, dtype, min(_CHUNK, count - first))
