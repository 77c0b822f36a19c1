"""Refuses what isn't text, wherever text comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from ..errors import PromptError


def check_text(text: object, name: str) -> TypeGuard[str]:
    """Refuses anything but a string of whole characters; ``name`` says in the message which text it is. Returns True.

    Raises:
        PromptError: ``text`` isn't a string, or holds half of a surrogate pair, which no tokenizer reads.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} is of type {type(text).__name__}, not a string", hint="give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of {name} is half of a surrogate pair", hint="decode the text before it is sent"
        ) from None
    return True


def check_json(value: object, name: str, deepest: int = 64) -> None:
    """Refuses anything but JSON of valid text, at most ``deepest`` levels deep.

    Raises:
        PromptError: ``value`` holds something else.
    """
    if isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, (list, tuple, Mapping)):
        if not deepest:
            raise PromptError(f"{name} is nested too deeply", hint="nest it less")
        for key in value if isinstance(value, Mapping) else ():
            check_text(key, f"a name in {name}")
        for each in value.values() if isinstance(value, Mapping) else value:
            check_json(each, name, deepest - 1)
    elif not isinstance(value, (bool, int, float, type(None))):
        raise PromptError(f"{name} holds a {type(value).__name__}, which isn't JSON", hint="give JSON")
