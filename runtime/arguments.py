"""Checks the types of arguments: numpy's numbers are numbers, None is "not given", anything else is refused by name."""

from __future__ import annotations

import dataclasses
import numbers as kinds
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .errors import DeployError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

MAX_INTEGER = 1 << 40
"""Largest integer that a record takes where nothing else is said. Libraries take no larger ones than 2 ** 63."""
Default = TypeVar("Default")


def is_integer(value: object) -> bool:
    """Returns true for Python's and numpy's integers. Truth values aren't integers."""
    return isinstance(value, kinds.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns true for finite real numbers of Python and numpy. Truth values aren't numbers."""
    if isinstance(value, bool) or not isinstance(value, kinds.Real):
        return False
    try:
        return bool(np.isfinite(float(value)))
    except OverflowError:
        return False


def integer(name: str, value: Any, default: Default, low: int = 1, high: int | None = None) -> int | Default:
    """Returns ``value`` as Python's int, or ``default`` if it is None.

    Raises:
        UsageError: it is no integer, below ``low`` or above ``high``.
    """
    if value is None:
        return default
    if not is_integer(value) or value < low or (high is not None and value > high):
        hint = f"{name} is an integer from {low}" + ("" if high is None else f" to {high}")
        raise UsageError(f"{name} is {shown(value)}", hint=hint)
    return int(value)


def integers(name: str, value: Any, low: int = 1) -> tuple[int, ...]:
    """Returns integers as a tuple of Python's.

    Raises:
        UsageError: it isn't a list of integers, or one is below ``low``.
    """
    found = _listed(value)
    if not all(is_integer(each) and each >= low for each in found):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is a list of integers from {low}")
    return tuple(map(int, found))


def number(name: str, value: Any, default: Default, low: float = 0.0, high: float = float("inf")) -> float | Default:
    """Returns ``value`` as Python's float, or ``default`` if it is None.

    Raises:
        UsageError: it is no finite number from ``low`` to ``high``.
    """
    if value is None:
        return default
    if not is_number(value) or not low <= value <= high:
        bounds = f"from {low:g}" + (f" to {high:g}" if high < float("inf") else "")
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is a number {bounds}")
    return float(value)


def numbers(name: str, value: Any, low: float = 0.0) -> tuple[float, ...]:
    """Returns numbers as a tuple of Python's floats.

    Raises:
        UsageError: it isn't a list of finite numbers, or one is below ``low``.
    """
    found = _listed(value)
    if not all(is_number(each) and each >= low for each in found):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is a list of numbers from {low:g}")
    return tuple(map(float, found))


def _listed(value: Any) -> list[Any]:
    """Returns what a list holds; for anything else a list of None, which is no number."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else [None]


def choice(name: str, value: Any, known: Collection[str], default: str) -> str:
    """Returns ``value``, or ``default`` if it is None.

    Raises:
        UsageError: it is none of ``known``.
    """
    if value is None:
        return default
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is one of {', '.join(known)}")
    return value


def path(name: str, value: Any) -> Path:
    """Returns ``value`` as a path.

    Raises:
        UsageError: it is no path, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is the path of a file or folder")
    from pathlib import Path

    return Path(value)


def optional_path(name: str, value: Any) -> Path | None:
    """Returns ``value`` as a path, or None if it is None; :func:`path` says what is refused."""
    return None if value is None else path(name, value)


def settings(name: str, value: Any, kind: type[Any], *, required: bool = False) -> Any:
    """Returns ``value``, or ``kind()`` if it is None and isn't ``required``.

    Raises:
        UsageError: it is no ``kind``.
    """
    if value is None and not required:
        return kind()
    if not isinstance(value, kind):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is a {kind.__name__}")
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Returns strings as a tuple.

    Raises:
        UsageError: it isn't a list of strings. One string alone isn't, either.
    """
    found: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
    if not all(isinstance(each, str) for each in found):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is a list of strings")
    return tuple(found)


def settle(chosen: Any, limits: Mapping[str, tuple[float, float]], error: type[DeployError] = UsageError) -> None:
    """Makes the fields of a frozen record what their types say: numpy's numbers become Python's, None becomes the default.

    ``limits``: smallest and largest value of the fields that are numbers, by name. Fields of other types are left alone.

    Raises:
        UsageError: a field of another type, or out of its limits; ``error`` names another class.
    """
    try:
        _settle(chosen, limits)
    except UsageError as refused:
        raise error(refused.message, hint=refused.hint) from None


def _settle(chosen: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    for field in dataclasses.fields(chosen):
        value, kind = getattr(chosen, field.name), str(field.type).removesuffix(" | None")
        optional = kind != str(field.type)
        if value is None and (optional or field.default is not dataclasses.MISSING):
            value = None if optional else field.default
        elif kind == "int":
            low, high = limits.get(field.name, (0, MAX_INTEGER))
            value = integer(field.name, value, 0, int(low), int(high))
        elif kind == "float":
            value = number(field.name, value, 0.0, *limits.get(field.name, (0.0,)))
        elif kind == "bool":
            value = flag(field.name, value)
        elif kind == "Path":
            value = path(field.name, value)
        elif kind == "str" and not isinstance(value, str):
            raise UsageError(f"{field.name} is {shown(value)}", hint=f"{field.name} is a string")
        object.__setattr__(chosen, field.name, value)


def flag(name: str, value: Any, *, default: bool = False) -> bool:
    """Returns ``value`` as Python's bool, or ``default`` if it is None.

    Raises:
        UsageError: it is no truth value.
    """
    if value is None:
        return default
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is True or False")
    return bool(value)


def shown(value: object) -> str:
    """Returns a short form of ``value`` for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
