"""What an installed package weighs: its own files and those of everything it requires."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def footprint(roots: Iterable[str]) -> dict[str, int]:
    """Bytes of each installed distribution that ``roots`` (as in ``name[extra]``) need, themselves included.

    Requirements that aren't installed here (another platform's, say) weigh nothing.
    """
    sizes: dict[str, int] = {}
    waiting, seen = list(roots), set[tuple[str, frozenset[str]]]()
    while waiting:
        name, extras = _parse(waiting.pop())
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in sizes:
            sizes[name] = _size(distribution)
        for requirement in distribution.requires or ():
            spec, _, marker = requirement.partition(";")
            optional = set(_EXTRA.findall(marker))
            if not optional or optional & extras:
                waiting.append(spec)
    return dict(sorted(sizes.items()))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below ``folder``, links followed, bytecode left out."""
    total = 0
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        total += sum((Path(parent) / name).stat().st_size for name in files)
    return total


def _parse(requirement: str) -> tuple[str, frozenset[str]]:
    match = _NAME.match(requirement)
    assert match is not None, requirement
    extras = frozenset(extra.strip() for extra in (match[2] or "").split(",") if extra.strip())
    return re.sub(r"[-_.]+", "-", match[1]).lower(), extras


def _size(distribution: metadata.Distribution) -> int:
    paths = (Path(str(distribution.locate_file(file))) for file in distribution.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc")
