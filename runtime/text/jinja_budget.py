"""The budget of the functions in Python that a chat template calls: minijinja's own doesn't count what they read and make."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

MAX_CHARS = 16 << 20
"""Characters that these functions read and make while a thread renders once."""

MAX_WIDTH = 10_000
"""Characters that a text is filled up to."""


class SpentError(Exception):
    """A template's functions have used up their budget."""


class _Spent(threading.local):
    chars = 0


_spent = _Spent()


def begin_rendering() -> None:
    """Give the functions of this thread their whole budget."""
    _spent.chars = 0


def spend(chars: int) -> None:
    """Take characters from the budget of this thread.

    Raises:
        SpentError: there are none left.
    """
    _spent.chars += max(chars, 16)
    if _spent.chars > MAX_CHARS:
        raise SpentError(f"more than {MAX_CHARS} characters")


def size(value: Any) -> int:
    """Characters that a value has about when it is printed."""
    if isinstance(value, str):
        return len(value)
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return 16 + sum(map(size, parts))


def bounded(value: Any) -> Any:
    """Return a value; a text counts as read."""
    if isinstance(value, str):
        spend(len(value))
    return value


def checked_width(width: int) -> int:
    """Return a width; it counts as made.

    Raises:
        ValueError: it is more than ``MAX_WIDTH``.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"a width of more than {MAX_WIDTH} characters")
    spend(width)
    return width
