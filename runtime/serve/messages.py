"""Chat messages as clients send them, and as templates read them."""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import ApiError


class CalledFunction(msgspec.Struct):
    """A function that an assistant called, and its arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(msgspec.Struct):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct):
    """A chat message; its content is text or parts of text."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Return messages as the template takes them."""
    return [_plain(index, message) for index, message in enumerate(messages)]


def _plain(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise ApiError(400, f"{where}.{name} isn't supported by this server", param=where, code="unsupported_parameter")
    text = message.content
    if not isinstance(text, str):
        parts = text or []
        wrong = next((part for part in parts if part.get("type") != "text" or not isinstance(part.get("text"), str)), None)
        if wrong is not None:
            raise ApiError(400, f"{where} has a part that isn't text", param=where, code="unsupported_parameter")
        text = "".join(part["text"] for part in parts)
    optional = {name: getattr(message, name) for name in ("name", "reasoning_content", "tool_call_id")}
    plain: dict[str, Any] = {"role": message.role, "content": text}
    plain |= {name: value for name, value in optional.items() if value is not None}
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(where, call) for call in message.tool_calls]
    return plain


def _plain_call(where: str, call: Call) -> dict[str, Any]:
    """Return a call with its arguments as an object: templates write them as JSON themselves."""
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            arguments = None
    if call.type != "function" or not isinstance(arguments, dict):
        message = f"{where}.tool_calls has a call that isn't a function's, or whose arguments aren't a JSON object"
        raise ApiError(400, message, param=where, code="invalid_value")
    return {"id": call.id or "", "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
