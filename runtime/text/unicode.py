"""Refuses what isn't text, wherever text comes in."""

from __future__ import annotations

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
