"""Renders chat templates. They are untrusted Jinja text from a checkpoint: minijinja renders them under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..errors import MissingDependencyError, PromptError, TemplateError
from .jinja_budget import SpentError, begin_rendering
from .jinja_functions import FILTERS, FUNCTIONS, TESTS, RefusedError
from .jinja_source import rewrite
from .jinja_writer import UnsupportedError
from .unicode import check_json, check_text

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 4 << 20
FUEL = 2_000_000
"""Budget in minijinja's unit: about one for an instruction and one for 64 bytes of a new string. It lasts about a second."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thoughts. Templates read the first two, whichever the message has."""


class ChatTemplate:
    """A compiled chat template. It renders as transformers renders it with jinja2: names, functions, whitespace, thoughts.

    A template reads the messages and nothing else: no files, no Python objects. ``FUEL`` bounds its running time, and a budget of
    characters what its functions read and what it repeats. A list that is nested in itself many times over is counted by neither:
    look at a template from an unknown source before you use it.

    Raises:
        TemplateError: the template is too long, or isn't valid Jinja.
        MissingDependencyError: ``minijinja`` isn't installed.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        """``special_tokens``: literals by the names under which the template reads them, such as ``bos_token``."""
        try:
            import minijinja
        except ImportError:
            raise MissingDependencyError(
                "chat messages need the package minijinja", hint="pip install 'medusa-deploy[cpu]', or give a prompt"
            ) from None
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters, over the limit of {MAX_TEMPLATE_CHARS}",
                hint="don't use this bundle",
            )
        self._special = dict(special_tokens)
        self._errors = minijinja.TemplateError
        self._environment = minijinja.Environment(
            fuel=FUEL, debug=False, pycompat=True, trim_blocks=True, lstrip_blocks=True, auto_escape_callback=lambda _name: False
        )
        for name, function in FUNCTIONS.items():
            self._environment.add_global(name, function)
        for name, function in FILTERS.items():
            self._environment.add_filter(name, function)
        for name, function in TESTS.items():
            self._environment.add_test(name, function)
        try:
            self._environment.add_template("chat", rewrite(source))
        except UnsupportedError as error:
            raise TemplateError(str(error), hint="correct the template, and export again") from None
        except self._errors as error:
            raise TemplateError(
                f"line {error.line} of the chat template: {error.detail or error.kind}",
                hint="correct the template, and export again",
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Renders ``messages`` up to the beginning of the assistant's answer. ``tools``: functions that the model may call.

        Raises:
            PromptError: the messages are not a list of objects with a ``role`` and a ``content``, or the tools aren't JSON.
            TemplateError: the template refuses the messages, fails, exceeds its budget, or doesn't show tools to the model.
        """
        check_messages(messages)
        text = self._render(messages, None)
        if not tools:
            return text
        check_json(tools, "tools")
        with_tools = self._render(messages, [dict(tool) for tool in tools])
        if with_tools == text:
            raise TemplateError("the chat template takes no tools", hint="leave tools out", argument="tools")
        return with_tools

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        begin_rendering()
        read = {"messages": [_with_thoughts(message) for message in messages], "tools": tools, "documents": None}
        try:
            text: str = self._environment.render_template("chat", **{**self._special, **read, "add_generation_prompt": True})
        except RefusedError as error:
            raise TemplateError(
                f"the chat template refuses the messages: {error}", hint="change the messages accordingly"
            ) from None
        except SpentError as error:
            raise TemplateError(
                f"the chat template repeats or reads too much: {error}", hint="shorten the messages, or correct the template"
            ) from None
        except self._errors as error:
            if error.kind == "OutOfFuel":
                raise TemplateError(
                    f"the chat template used up its budget of {FUEL} units",
                    hint="shorten the messages, or correct the template's loops",
                ) from None
            raise TemplateError(
                f"line {error.line} of the chat template: {error.detail or error.kind}",
                hint="correct the template, or give a prompt instead of messages",
            ) from None
        except Exception as error:  # noqa: BLE001 Python's functions raise anything
            raise TemplateError(
                f"the chat template calls a function wrongly: {error}",
                hint="correct the template, or give a prompt instead of messages",
            ) from None
        if len(text) > MAX_OUTPUT_CHARS:
            raise TemplateError(
                f"the chat template made {len(text)} characters, over the limit of {MAX_OUTPUT_CHARS}",
                hint="shorten the messages",
            )
        return text


def check_messages(messages: object) -> None:
    """Refuses anything but a list of chat messages.

    Raises:
        PromptError: a message is malformed. The error has its index.
    """
    hint = 'messages are a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise PromptError(f"messages are of type {type(messages).__name__}", hint=hint)
    if not messages:
        raise PromptError("there are no messages", hint=hint)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {index} is of type {type(message).__name__}", hint=hint)
        for name in ("role", "content"):
            if name not in message:
                raise PromptError(f"message {index} has no {name}", hint=hint)
        for name, value in message.items():
            check_text(name, f"a name in message {index}")
            (check_json if name == "tool_calls" else check_text)(value, f"{name!r} of message {index}")
        if not message["role"]:
            raise PromptError(f"the role of message {index} is empty", hint=hint)


def _with_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its thoughts under the names that templates read."""
    thoughts = next((message[name] for name in _REASONING if name in message), None)
    if thoughts is None:
        return dict(message)
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}
