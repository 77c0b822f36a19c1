"""Opens several graphs of one model over one file of packed weights.

ONNX Runtime packs the weights of a session for the processor, and each session packs its own. It can also save an optimised graph
whose weights lie packed in a file, and map that file when the graph is opened. This module saves a graph's twins that way, lets
all of them refer to the file of the first one, and keeps them in a cache: the sessions then share one copy in memory.

A cache entry belongs to one graph, one version of ONNX Runtime and one kind of processor. It is made whole or not at all.
A record in it says what it was made from and by, so that :mod:`..files.cache` removes what can't be of use any more.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..files import cache

_RECORD = "made_from.json"
_LOCATION = "session.optimized_model_external_initializers_file_name"
_SAVING = {
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}


def shared_graphs(
    graphs: Mapping[int, Path], identity: str, version: str, save: Callable[[Path, Path, Mapping[str, str]], None]
) -> tuple[dict[int, Path], int]:
    """Return the cached twin of each of ``graphs``, made where it is missing; all read one file of packed weights.

    The second value is a descriptor that holds the twins: as long as it is open, no process removes them.

    ``graphs``: by any number; the smallest one's weights are kept. ``identity``: stands for the contents of graphs and weights.
    ``version``: of ONNX Runtime. ``save`` opens a graph, writes it optimised to a path, and passes entries of the session's
    configuration on.

    Raises:
        OSError: the cache can't be written.
        UsageError: a setting of the cache has a wrong value.
    """
    root, maker, first = cache.cache_folder(), f"{version}\n{processor()}", min(graphs)
    entry = root / hashlib.sha256(f"{identity}\n{maker}".encode()).hexdigest()[:32]
    source, made_by = graphs[first].parent, hashlib.sha256(maker.encode()).hexdigest()
    handle = cache.hold(entry)
    try:
        found = {number: entry / f"{number}.onnx" for number in graphs}
        missing = [number for number in sorted(graphs) if not _is_whole(found[number])]
        needed = 3 * sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) if missing else 0
        cache.prune(root, lambda path: _is_stale(path, made_by), room=needed)
        if missing:
            if shutil.disk_usage(root).free < needed:  # begin nothing that the disk can't hold
                raise _no_room(root, needed)
            with cache.staging(root) as staging:
                known = None if first in missing else _places(found[first].read_bytes())
                try:
                    for number in missing:
                        known = _make(graphs[number], staging / f"{number}.onnx", known, save)
                except OSError:
                    raise
                except Exception as error:
                    raise _no_room(root, needed, error) from error
                for file in sorted(staging.iterdir()):  # weights before the graph that reads them
                    file.replace(entry / file.name)
            cache.prune(root, lambda path: _is_stale(path, made_by))
        _note_source(entry, {"folder": str(source.resolve()), "changed": source.stat().st_mtime_ns, "made_by": made_by})
        return found, handle
    except BaseException:
        cache.let_go(entry, handle)
        raise


def _make(
    source: Path, graph: Path, known: dict[str, list[bytes]] | None, save: Callable[[Path, Path, Mapping[str, str]], None]
) -> dict[str, list[bytes]]:
    """Save the twin of one graph, over the weights at ``known`` places if it has the same. Returns where weights lie.

    Raises:
        ValueError: what was saved ends too early.
    """
    weights = graph.with_suffix(".bin")
    save(source, graph, {_LOCATION: weights.name, **_SAVING})
    if not _is_whole(graph):  # ONNX Runtime may write on without a word where a disk is full
        raise ValueError(f"{graph.name} was cut short")
    if known is None:
        return _places(graph.read_bytes())
    if (changed := _with_places(graph.read_bytes(), known)) is not None:
        graph.write_bytes(changed)
        weights.unlink()
    return known


def _no_room(root: Path, needed: int, error: Exception | None = None) -> OSError:
    free, where = shutil.disk_usage(root).free, cache.mount_point(root)
    said = "" if error is None else f"; ONNX Runtime says: {str(error).strip().rpartition(' : ')[2][-200:]}"
    return OSError(
        errno.ENOSPC,
        f"{-(-needed >> 20)} MiB may be needed, and {free >> 20} MiB are free on the file system {where}{said}",
        str(root),
    )


def _note_source(entry: Path, record: Mapping[str, str | int]) -> None:
    """Write down what an entry was last used for. Whoever may only read the cache leaves it."""
    text, path = json.dumps(record), entry / _RECORD
    with contextlib.suppress(OSError):
        if not path.exists() or path.read_text("utf-8") != text:
            staged = entry / f".{_RECORD}"
            staged.write_text(text, "utf-8")
            staged.replace(path)


def _is_stale(entry: Path, made_by: str) -> bool:
    """Whether the entry's graph is gone or changed, or it was made for another processor or version of ONNX Runtime."""
    try:
        record = json.loads((entry / _RECORD).read_bytes())
        return bool(record["made_by"] != made_by or Path(record["folder"]).stat().st_mtime_ns != record["changed"])
    except (OSError, LookupError, ValueError, TypeError):
        return True


def _is_whole(graph: Path) -> bool:
    """Whether a cached graph is there, and with it all bytes of weights that it reads."""
    try:
        ends: dict[str, int] = {}
        for entries in _places(graph.read_bytes()).values():
            place = {_all(entry, 1)[0]: _all(entry, 2)[0] for entry in entries}
            file = place[b"location"].decode()
            blobs = [value.split(b"|")[1].split(b";")[:2] for key, value in place.items() if key.startswith(b"prepacked")]
            spans = [(place[b"offset"], place[b"length"]), *blobs]
            ends[file] = max([ends.get(file, 0), *(int(offset) + int(length) for offset, length in spans)])
        return all((graph.parent / file).stat().st_size >= end for file, end in ends.items())
    except (OSError, LookupError, ValueError):
        return False


def processor() -> str:
    """Describe the kind of processor and the instructions that it has, on which packing depends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
            kinds = ("model name", "flags", "Features", "CPU part")
            return "\n".join(line for line in lines if line.startswith(kinds))
    return f"{platform.machine()} {platform.processor()}"


# -- where a saved graph's weights lie: protocol buffers, read as far as that takes ----------------------------------

_GRAPH, _INITIALIZER, _NAME, _EXTERNAL, _KEY = 7, 5, 8, 13, 1  # field numbers in ModelProto, GraphProto, TensorProto, its entries


def _places(model: bytes) -> dict[str, list[bytes]]:
    """Return, for each tensor with data in a file, the encoded entries that say where."""
    found: dict[str, list[bytes]] = {}
    for graph in _all(model, _GRAPH):
        for tensor in _all(graph, _INITIALIZER):
            entries = _all(tensor, _EXTERNAL)
            if entries:
                found[_all(tensor, _NAME)[0].decode()] = entries
    return found


def _with_places(model: bytes, places: Mapping[str, list[bytes]]) -> bytes | None:
    """Return ``model`` with its tensors at ``places``; None if those aren't the same tensors, packed the same way."""

    def tensor_at(tensor: bytes) -> bytes:
        entries = _all(tensor, _EXTERNAL)
        if not entries:
            return tensor
        there = places[_all(tensor, _NAME)[0].decode()]
        if _contents(entries) != _contents(there):
            raise KeyError
        kept = [_field(number, kind, value) for number, kind, value in _fields(tensor) if number != _EXTERNAL]
        return b"".join(kept) + b"".join(_field(_EXTERNAL, 2, entry) for entry in there)

    def graph_at(graph: bytes) -> bytes:
        return b"".join(
            _field(number, kind, tensor_at(value) if number == _INITIALIZER and isinstance(value, bytes) else value)
            for number, kind, value in _fields(graph)
        )

    try:
        return b"".join(
            _field(number, kind, graph_at(value) if number == _GRAPH and isinstance(value, bytes) else value)
            for number, kind, value in _fields(model)
        )
    except KeyError:
        return None


def _contents(entries: list[bytes]) -> set[tuple[bytes, ...]]:
    """What entries say of the data itself: lengths, and names of packed forms, which hold a hash of the data."""
    pairs = [(_all(entry, 1)[0], _all(entry, 2)[0]) for entry in entries]
    lengths = {(key, value) for key, value in pairs if key == b"length"}
    return lengths | {(b"packed", value.split(b"|")[0]) for key, value in pairs if key.startswith(b"prepacked")}


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Yield a message's fields: number, wire type, and value. Raises ValueError or IndexError where it ends too early."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: bytes | int
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[kind]
            value, at = message[at : at + size], at + size
        if at > len(message):
            raise ValueError("a message ends within a field")
        yield number, kind, value


def _all(message: bytes, number: int) -> list[bytes]:
    return [value for found, _, value in _fields(message) if found == number and isinstance(value, bytes)]


def _field(number: int, kind: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _encoded(number << 3 | kind) + _encoded(value)
    return _encoded(number << 3 | kind) + (_encoded(len(value)) if kind == 2 else b"") + value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
