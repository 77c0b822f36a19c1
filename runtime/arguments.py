"""Checks the types of arguments: numpy's numbers are numbers, None is "not given", anything else is refused by name."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from .errors import UsageError


def is_integer(value: object) -> bool:
    """Returns true for Python's and numpy's integers. Truth values aren't integers."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns true for finite real numbers of Python and numpy. Truth values aren't numbers."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return bool(np.isfinite(float(value)))
    except OverflowError:
        return False


def integer(name: str, value: Any, default: int, low: int = 1) -> int:
    """Returns ``value`` as Python's int, or ``default`` if it is None.

    Raises:
        UsageError: it is no integer, or below ``low``.
    """
    if value is None:
        return default
    if not is_integer(value) or value < low:
        raise UsageError(f"{name} is {shown(value)}", hint=f"{name} is an integer from {low}")
    return int(value)


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
