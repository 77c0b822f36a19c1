"""Renders a chat template as transformers does and as the runtime does, over several chats, and says where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...runtime.errors import TemplateError
from ...runtime.text.template import ChatTemplate

_SYSTEM = {"role": "system", "content": " You are brief. "}
_USER = {"role": "user", "content": "Hello <b> & 'you'\n"}
_ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes?"}
_LAST = {"role": "user", "content": "Why 日本 👋?"}
CHATS: tuple[list[dict[str, str]], ...] = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ANSWER, _LAST],
    [_SYSTEM, _USER, _ANSWER, _LAST],
    [_SYSTEM],
    [_USER, _ANSWER],
    [_USER, _LAST],
    [{"role": "user", "content": ""}],
    [_USER, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, _LAST],
    [_USER, {"role": "tool", "content": "4", "name": "sum"}],
    [{**_USER, "name": "Ada"}, {"role": "developer", "content": "x"}, {"role": "other", "content": "y"}],
)
"""Shapes of chats: with and without a system message, turns that alternate or not, names, thoughts, unusual roles."""


def differences(template: str, special_tokens: Mapping[str, str]) -> str | None:
    """Return what the first of :data:`CHATS` that renders differently becomes in both; None if all are equal.

    Two that fail are equal, whatever they say.
    """
    for chat in CHATS:
        theirs, ours = _theirs(template, chat, special_tokens), _ours(template, chat, special_tokens)
        if theirs != ours:
            roles = ", ".join(message["role"] for message in chat)
            return f"a chat of {roles} becomes {_shown(theirs)} by transformers, {_shown(ours)} here"
    return None


def _theirs(template: str, chat: list[dict[str, str]], special_tokens: Mapping[str, str]) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **special_tokens)
    except Exception as error:  # noqa: BLE001 a template raises anything
        return error
    return rendered[0]


def _ours(template: str, chat: list[dict[str, str]], special_tokens: Mapping[str, str]) -> Any:
    try:
        return ChatTemplate(template, special_tokens).render(chat)
    except TemplateError as error:
        return error


def _shown(result: Any) -> str:
    if isinstance(result, Exception):
        return f"an error ({str(result).splitlines()[0] if str(result) else type(result).__name__})"
    return repr(result[:200])
