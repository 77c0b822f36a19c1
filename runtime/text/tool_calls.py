"""Calls of tools as a model writes them: the form that its chat template shows, a grammar of it, and a reader of streamed text.

One form is known, that of ChatML templates such as Qwen's: a JSON object between ``<tool_call>`` and ``</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TemplateError
from ..grammar import AS_DUMPED, Grammar

if TYPE_CHECKING:
    from .encoder import PromptEncoder

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_PROBE = {"name": "probed_function", "arguments": {"probed": 1}}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a model writes a call: the whitespace around the JSON, and the order of its two members."""

    before: str = "\n"
    after: str = "\n"
    names: tuple[str, ...] = ("name", "arguments")

    @classmethod
    def of(cls, encoder: PromptEncoder) -> CallForm:
        """Return the form in which the chat template writes a call that an assistant made earlier.

        Raises:
            TemplateError: the template writes none, or in another form.
        """
        call = {"id": "call_0", "type": "function", "function": _PROBE}
        asked: dict[str, Any] = {"role": "user", "content": "?"}
        chat = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            text = encoder.render(chat)
        except TemplateError:
            text = ""
        for before, inner, after in re.findall(rf"{OPENING}(\s*)(\{{.*?\}})(\s*){CLOSING}", text, re.DOTALL):
            try:
                found = json.loads(inner)
            except ValueError:
                continue
            if found == _PROBE:
                return cls(before, after, tuple(found))
        raise TemplateError(
            "the chat template doesn't write calls of tools in a known form",
            hint=f"known: {OPENING}{{JSON}}{CLOSING}, as ChatML and Qwen have it",
            argument="tools",
        )

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool, text: bool) -> Grammar:
        """Return the grammar of calls of ``tools``, which are functions with a name and perhaps ``parameters``, a JSON schema.

        ``several``: whether an answer may hold several calls. ``text``: whether it may hold text, too, and no call at all.
        """
        lines = []
        for index, tool in enumerate(tools):
            schema = {**(tool.get("parameters") or _NO_PARAMETERS), "x-guidance": AS_DUMPED}
            lines.append(f"arguments_{index}: %json {json.dumps(schema, ensure_ascii=False)}")
            values = {"name": _literal(json.dumps(tool["name"])), "arguments": f"arguments_{index}"}
            first, second = [_literal(f'"{name}": ') + " " + values[name] for name in self.names]
            lines.append(f'call_{index}: "{{" {first} ", " {second} "}}"')
        either = " | ".join(f"call_{index}" for index in range(len(tools)))
        lines.append(f"call: {_literal(self.before)} ({either}) {_literal(self.after + CLOSING)}")
        if text:
            lines.append(f"opened[lazy]: /(.|\\n)*{OPENING}/")
            start = "(opened call)* /(.|\\n)*/" if several else "opened call | /(.|\\n)*/"
        else:
            start = f"{_literal(OPENING)} call" + (f" ({_literal(chr(10) + OPENING)} call)*" if several else "")
        return Grammar("lark", "\n".join([f"start: {start}", *lines]))


def _literal(text: str) -> str:
    """Return ``text`` as Lark writes it; nothing for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


class CallReader:
    """Splits the text of one answer into text and calls, as it comes. The pieces don't depend on how it is split."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._held = ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text. Returns the text that is certainly none of a call, and the calls that are complete now."""
        self._held += text
        shown, calls = "", []
        while (start := self._held.find(OPENING)) >= 0:
            end = self._held.find(CLOSING, start)
            if end < 0:
                break
            call = _call(self._held[start + len(OPENING) : end])
            before, written, self._held = self._held[:start], self._held[: end + len(CLOSING)], self._held[end + len(CLOSING) :]
            if call is None:
                shown += written
            else:
                shown += before.rstrip()
                calls.append(call)
        certain = start if start >= 0 else len(self._held) - _beginning(self._held)
        certain = len(self._held[:certain].rstrip())
        shown, self._held = shown + self._held[:certain], self._held[certain:]
        self.calls += calls
        return shown, calls

    def flush(self) -> str:
        """Return the text held back, at the end. A call that wasn't finished is text; whitespace behind calls is none."""
        held, self._held = self._held, ""
        return "" if self.calls and not held.strip() else held


def _beginning(text: str) -> int:
    """Return the length of the longest end of ``text`` that may begin a call."""
    return next((length for length in range(len(OPENING) - 1, 0, -1) if text.endswith(OPENING[:length])), 0)


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not isinstance(found.get("arguments"), dict):
        return None
    return ToolCall(found["name"], json.dumps(found["arguments"], ensure_ascii=False))
