"""Uploads weights that an engine takes as inputs, from the bundle's files into device memory, through one pinned buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import BundleIntegrityError
from ...files.bundle import Bundle
from ...files.weight_inputs import WeightInput, WeightPiece
from .cuda import Cuda, DeviceMemory

STAGING_BYTES = 32 << 20
_ALIGNMENT = 256


def upload_weights(cuda: Cuda, stream: Any, bundle: Bundle, weights: Sequence[WeightInput]) -> dict[str, int]:
    """Uploads the weights, waits for them, and returns their device addresses by input name. One allocation holds them all.

    The two halves of the staging buffer take turns: one is filled from disk while the other is copied to the device.

    Raises:
        BundleIntegrityError: a file is missing or ends before a piece does.
        DeviceMemoryError: the weights don't fit on the device.
    """
    offsets: dict[str, int] = {}
    total = 0
    for weight in weights:
        offsets[weight.name] = total
        total += -(-sum(piece.nbytes for piece in weight.pieces) // _ALIGNMENT) * _ALIGNMENT
    if not total:
        return {}
    memory = cuda.allocate(total, f"{len(offsets)} weights")
    pieces = [piece for weight in weights for piece in _placed(memory, offsets[weight.name], weight)]
    half = STAGING_BYTES // 2
    staging = cuda.pinned(STAGING_BYTES, "weights on their way to the GPU")
    sent = [cuda.event(), cuda.event()]
    for event in sent:
        cuda.record(event, stream)
    turn = 0
    for address, piece in pieces:
        with bundle.path(piece.file).open("rb", buffering=0) as file:
            file.seek(piece.offset)
            for start in range(0, piece.nbytes, half):
                count = min(half, piece.nbytes - start)
                at = turn * half
                cuda.wait(sent[turn])
                view = staging.bytes.data[at : at + count]
                if _read(file, view) != count:
                    raise BundleIntegrityError(
                        f"{piece.file} ends before byte {piece.offset + piece.nbytes}, where a weight lies",
                        hint="copy or export the bundle again",
                    )
                cuda.upload(address + start, staging.address + at, count, stream)
                cuda.record(sent[turn], stream)
                turn = 1 - turn
    cuda.synchronize(stream)
    cuda.free(staging)
    return {name: memory.address + offset for name, offset in offsets.items()}


def _placed(memory: DeviceMemory, offset: int, weight: WeightInput) -> list[tuple[int, WeightPiece]]:
    """Pairs each piece with its device address."""
    placed = []
    for piece in weight.pieces:
        placed.append((memory.address + offset, piece))
        offset += piece.nbytes
    return placed


def _read(file: Any, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done
