"""Reads JSON that somebody else wrote: checks sizes and types, and turns every failure into a named error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import DeployError


def read_json_file(path: Path, *, limit: int, error: type[DeployError], hint: str, too_large: str | None = None) -> Any:
    """Returns the file's content. ``limit`` is in bytes. ``too_large``: hint for a file over the limit (None: ``hint``).

    Raises:
        DeployError: as an ``error``: the file is missing, unreadable, over ``limit``, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path} has {size} bytes, over the limit of {limit}", hint=too_large or hint)
        return json.loads(path.read_bytes())
    except OSError as failure:
        raise error(f"{path} can't be read: {failure.strerror or failure}", hint=hint) from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{path} is not JSON: {failure}", hint=hint) from None


def is_int(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a number and no truth value. An integer that is too large for a float isn't one."""
    return isinstance(value, float) or (is_int(value) and abs(value) < 1 << 1000)


def is_strings(value: object) -> TypeGuard[list[str]]:
    """Whether ``value`` is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# Checks by annotation. Records, and lists inside trees, are checked where they are built.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "int": is_int,
    "float": is_number,
    "float | None": lambda value: value is None or is_number(value),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "tuple[int, ...]": lambda value: all(is_int(item) for item in value),
    "tuple[str, ...]": lambda value: all(isinstance(item, str) for item in value),
    "Mapping[str, Any]": lambda value: isinstance(value, dict),
    "Mapping[str, int]": lambda value: isinstance(value, dict) and all(is_int(item) for item in value.values()),
    "Mapping[str, str]": lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    "Mapping[str, list[list[int]]]": lambda value: (
        isinstance(value, dict) and all(isinstance(item, list) for item in value.values())
    ),
}


def record(kind: type[Any], raw: Any, *, defaults: bool = False) -> Any:
    """Makes a dataclass from an object that has exactly its fields, each of its annotated type.

    ``defaults``: fields that have a default may be missing.

    Raises:
        ValueError: ``raw`` isn't such an object.
    """
    fields = kind.__dataclass_fields__
    if not isinstance(raw, Mapping):
        raise ValueError(f"{kind.__name__} is {raw!r:.80}")  # noqa: TRY004 - one kind of error, of the file
    different = set(raw) ^ set(fields)
    if defaults:
        with_defaults = {name for name, each in fields.items() if (each.default, each.default_factory) != (MISSING, MISSING)}
        different -= with_defaults - set(raw)
    if different:
        raise ValueError(f"missing or unknown field {sorted(different)} in {kind.__name__}")
    for name, value in raw.items():
        is_valid = _TYPES.get(fields[name].type)
        if is_valid is not None and not is_valid(value):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}, not of type {fields[name].type}")
    return kind(**raw)
