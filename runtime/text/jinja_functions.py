"""Functions, filters and tests that jinja2 gives to chat templates and minijinja doesn't, or gives otherwise.

minijinja hands undefined values over as None, floats without a fraction as integers, and functions as strings. ``jinja_source``
therefore writes ``_undefined`` behind what may be undefined.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from string import Formatter
from typing import Any, NoReturn

from .jinja_budget import MAX_WIDTH, bounded, checked_width, size, spend


class Undefined:
    """What jinja2 makes of a name without a value: no text, no items, no number."""

    def __str__(self) -> str:
        return ""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoJson:
    """Stands for an undefined value in JSON, which has none."""

    def __str__(self) -> str:
        return "an undefined value \x7f"


UNDEFINED, NO_JSON = Undefined(), NoJson()


class RefusedError(Exception):
    """Carries a template's own message through minijinja."""


def raise_exception(message: object) -> NoReturn:
    """Refuse the messages, in the template's words."""
    raise RefusedError(str(message))


def strftime_now(pattern: str) -> str:
    """Format the time of day, here and now."""
    return datetime.now().astimezone().replace(tzinfo=None).strftime(pattern)  # of no zone, as transformers' time is


class Cycler:
    """Jinja's ``cycler``: its ``next()`` returns the values in turn."""

    def __init__(self, *values: Any) -> None:
        if not values:
            raise TypeError("cycler needs at least one value")
        self._values, self._position = values, 0

    @property
    def current(self) -> Any:
        """The value that the next call of ``next`` returns."""
        return self._values[self._position]

    def next(self) -> Any:
        """Return a value and go on to the one behind it."""
        value = self.current
        self._position = (self._position + 1) % len(self._values)
        return value

    def reset(self) -> None:
        """Go back to the first value."""
        self._position = 0


def joiner(separator: str = ", ") -> Callable[[], str]:
    """Return a function that returns nothing at first, then the separator."""
    seen: list[bool] = []

    def join() -> str:
        seen.append(True)
        return separator if len(seen) > 1 else ""

    return join


# -- filters -----------------------------------------------------------------------------------------------------------


def to_json(
    text: str,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write minijinja's JSON as transformers writes it, without escapes for HTML."""
    spend(len(text) + checked_width(indent or 0))
    value = json.loads(text)
    if value == str(NO_JSON):
        raise TypeError("an undefined value is no JSON")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    spend(len(text))
    return text


def to_int(value: Any, default: Any = 0, base: int = 10) -> Any:
    """Return a whole number, or ``default`` for what is none."""
    if bounded(value) is UNDEFINED:
        raise TypeError("an undefined value is no number")
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


def to_float(value: Any, default: Any = 0.0) -> Any:
    """Return a number, or ``default`` for what is none."""
    if bounded(value) is UNDEFINED:
        raise TypeError("an undefined value is no number")
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def sort(value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None) -> list[Any]:
    """Sort items, or by an attribute of theirs such as ``function.name``."""

    def key(item: Any) -> Any:
        parts = str(attribute).split(".") if attribute is not None else []
        for part in parts:
            item = item[int(part) if part.isdigit() else part]
        return item.lower() if isinstance(item, str) and not case_sensitive else item

    return sorted(_items(value), key=key, reverse=reverse)


def wordcount(value: Any) -> int:
    """Count the words of a text."""
    return len([word for word in _words(str(bounded(value))) if word])


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()


def center(value: Any, width: int = 80) -> str:
    """Put spaces around a text."""
    return str(bounded(value)).center(checked_width(width))


def wordwrap(
    value: str, width: int = 79, break_long_words: bool = True, wrapstring: str = "\n", break_on_hyphens: bool = True
) -> str:
    """Break lines that are longer than ``width``."""
    lines = [
        textwrap.wrap(
            line,
            width=width,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=break_long_words,
            break_on_hyphens=break_on_hyphens,
        )
        for line in _text(value).splitlines()
    ]
    spend(checked_width(len(wrapstring)) * sum(map(len, lines)))
    return wrapstring.join(wrapstring.join(wrapped) for wrapped in lines)


def percent(pattern: str, values: Any) -> str:
    """Format with Python's ``%``. Widths and precisions that would make a long string are refused."""
    if "*" in pattern or _has_width(pattern):
        raise ValueError("a format with such a width")
    text = str(pattern % values)
    spend(len(text))
    return text


def _has_width(pattern: str) -> bool:
    """Say whether a number of more than four digits is in a pattern."""
    return any(len(number) > 4 for number in "".join(letter if letter.isdigit() else " " for letter in pattern).split())


def times(value: Any, count: Any) -> Any:
    """Multiply; what is repeated counts as read so many times."""
    for repeated, number in ((value, count), (count, value)):
        if isinstance(number, int) and not isinstance(repeated, (int, float)):
            spend(size(repeated) * max(number, 1))
    return value * count


REWRITTEN_METHODS = frozenset(
    ("casefold", "center", "expandtabs", "format", "index", "isdecimal", "isidentifier", "isprintable", "istitle", "ljust",
     "partition", "removeprefix", "removesuffix", "rindex", "rjust", "rpartition", "rsplit", "split", "swapcase", "title",
     "zfill")
)  # fmt: skip
"""Methods of strings that minijinja lacks or has otherwise."""


def method(value: Any, name: str, *arguments: Any, **named: Any) -> Any:
    """Call a method of a string, or ``index`` of a list, as Python does."""
    if isinstance(value, (list, tuple)) and name == "index":
        return value.index(*arguments)
    if not isinstance(value, str) or name not in REWRITTEN_METHODS:
        raise TypeError(f"{'an undefined value' if value is None else type(value).__name__} has no method {name}")
    if name == "format":
        return _formatted(value, arguments, named)
    if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        checked_width(arguments[0] if arguments else named.get("tabsize", 0))
        spend(value.count("\t") * (arguments[0] if arguments else named.get("tabsize", 8)))
    return getattr(bounded(value), name)(*arguments, **named)


def _formatted(pattern: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> str:
    """Format with Python's ``str.format``, without fields of values and without widths that would make a long string."""
    for _, field, spec, _ in Formatter().parse(str(bounded(pattern))):
        if field and not (field.isdecimal() or field.isidentifier()):
            raise ValueError("a format with a field of a value")
        if "{" in (spec or "") or _has_width(spec or ""):
            raise ValueError("a format with such a width")
        spend(MAX_WIDTH if spec else 0)
    text = pattern.format(*arguments, **named)
    spend(len(text))
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is not a string")
    return str(bounded(value))


def _items(value: Any) -> list[Any]:
    if value is None or not is_iterable(value):
        raise TypeError(f"{type(value).__name__} is not iterable")
    items: list[Any] = list(value)
    spend(sum(len(item) if isinstance(item, str) else 16 for item in items))
    return items


# -- tests -------------------------------------------------------------------------------------------------------------


def is_iterable(value: Any) -> bool:
    """Say whether Python iterates over a value. None isn't iterable, though minijinja finds it is."""
    return isinstance(value, Iterable)


def is_sequence(value: Any) -> bool:
    """Say whether a value has a length and items: strings and mappings have."""
    return isinstance(value, (Sequence, Mapping, Undefined))


FUNCTIONS: dict[str, Any] = {
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
    "cycler": Cycler,
    "joiner": joiner,
    "dict": dict,
    "_undefined": UNDEFINED,
    "_no_json": NO_JSON,
}
FILTERS: dict[str, Callable[..., Any]] = {
    "int": to_int,
    "float": to_float,
    "sort": sort,
    "wordcount": wordcount,
    "center": center,
    "wordwrap": wordwrap,
    "_json": to_json,
    "_percent": percent,
    "_times": times,
    "_method": method,
}
TESTS: dict[str, Callable[..., bool]] = {"iterable": is_iterable, "sequence": is_sequence}
