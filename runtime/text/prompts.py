"""Reads prompt files: JSON lines with one prompt each, as text, chat messages or token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError, PromptFileError
from ..request import Message, Request
from .template import check_messages
from .unicode import check_text

MAX_FILE_BYTES = 256 << 20
MAX_LINE_BYTES = 8 << 20
_KINDS = ("prompt", "messages", "token_ids")
_HINT = 'a line is {"prompt": "…"}, {"messages": [{"role": "user", "content": "…"}]} or {"token_ids": [1, 2]}'


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line: exactly one of ``prompt``, ``messages`` and ``token_ids``, and the ``category`` that its author gave it."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    category: str | None = None

    def request(self, **options: Any) -> Request:
        """Makes a request with this line's prompt. ``options``: other fields of :class:`.request.Request`."""
        return Request(prompt=self.prompt, messages=self.messages, token_ids=self.token_ids, **options)


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """Identifies prompts, given as token ids: sha256 (hex). Every record that says which prompts were used has this digest."""
    return hashlib.sha256(json.dumps([list(map(int, prompt)) for prompt in prompts]).encode()).hexdigest()


def read_prompts(path: Path | str) -> list[PromptLine]:
    """Reads a prompt file. Skips blank lines.

    Raises:
        PromptFileError: the file is missing or too large, holds no prompt, or has a wrong line. The message has its number.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PromptFileError(f"{path} has {size} bytes, over the limit of {MAX_FILE_BYTES}", hint="split the file")
        with path.open("rb") as file:
            lines = [(number, raw) for number, raw in enumerate(file, start=1) if raw.strip()]
    except OSError as error:
        raise PromptFileError(f"can't read {path}: {error.strerror}", hint="give a file of JSON lines") from None
    if not lines:
        raise PromptFileError(f"{path} holds no prompts", hint=_HINT)
    return [_read_line(raw, f"{path}, line {number}") for number, raw in lines]


def _read_line(raw: bytes, where: str) -> PromptLine:
    if len(raw) > MAX_LINE_BYTES:
        raise PromptFileError(f"{where} has {len(raw)} bytes, over the limit of {MAX_LINE_BYTES}", hint="shorten the prompt")
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{where} is not JSON: {error}", hint=_HINT) from None
    if not isinstance(entry, dict):
        raise PromptFileError(f"{where} is a {type(entry).__name__}, not an object", hint=_HINT)
    unknown = sorted(set(entry) - {*_KINDS, "category"})
    if unknown:
        raise PromptFileError(f"{where} has unknown fields {unknown}", hint=f"fields: {', '.join(_KINDS)}, category")
    given = [kind for kind in _KINDS if kind in entry]
    if len(given) != 1:
        raise PromptFileError(f"{where} has {' and '.join(given) or 'no prompt'}", hint=_HINT)
    category = entry.get("category")
    if category is not None and not isinstance(category, str):
        raise PromptFileError(f"{where}: category is {category!r}", hint="category is a string")
    kind = given[0]
    value = entry[kind]
    try:
        _check(kind, value)
    except PromptError as error:
        raise PromptFileError(f"{where}: {error.message}", hint=error.hint) from None
    fields: dict[str, Any] = {kind: value if kind == "prompt" else tuple(value), "category": category}
    return PromptLine(**fields)


def _check(kind: str, value: Any) -> None:
    if kind == "messages":
        check_messages(value)
    elif kind == "prompt":
        if check_text(value, "prompt") and not value:
            raise PromptError("prompt is empty", hint="prompt is a string that is not empty")
    elif not isinstance(value, list) or not value:
        raise PromptError(f"token_ids is {type(value).__name__} and not a list of ids", hint=_HINT)
    elif wrong := [token for token in value if not isinstance(token, int) or isinstance(token, bool) or token < 0]:
        raise PromptError(f"token_ids holds {wrong[0]!r}", hint="token ids are integers from 0")
