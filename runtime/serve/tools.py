"""Tools that an answer may call: what a request says of them, and the grammar of the calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..text.tool_calls import CallForm
from .errors import ApiError

if TYPE_CHECKING:
    from ..grammar import Grammar
    from ..text.encoder import PromptEncoder

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools of a request. ``shown``: as the template shows them. ``callable``: the functions that may be called.

    ``must``: whether the answer is calls and nothing else. ``several``: whether it may be more than one call.
    """

    shown: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    must: bool
    several: bool

    def grammar(self, encoder: PromptEncoder) -> Grammar | None:
        """Return the grammar of the answer; None where the model is free to write calls, right or wrong.

        Raises:
            TemplateError: the model's template doesn't write calls in a known form.
        """
        form = CallForm.of(encoder)
        strict = any(function.get("strict") for function in self.callable)
        return form.grammar(self.callable, several=self.several, text=not self.must) if self.must or strict else None


def tool_use(tools: list[dict[str, Any]] | None, choice: Any, *, several: bool) -> ToolUse | None:
    """Return how an answer may use tools; None where it can't. ``choice``: the field ``tool_choice``.

    Raises:
        ApiError: a tool is malformed, or the choice names none of them.
    """
    functions = [_function(index, tool) for index, tool in enumerate(tools or [])]
    if len(functions) > MAX_TOOLS:
        raise _refused("tools", f"{len(functions)} tools; at most {MAX_TOOLS} can be used")
    if len({function["name"] for function in functions}) < len(functions):
        raise _refused("tools", "two tools have the same name")
    if choice in (None, "auto", "none"):
        return None if choice == "none" or not functions else ToolUse(tools or [], functions, False, several)
    if not functions:
        raise _refused("tool_choice", "tool_choice needs tools")
    if choice == "required":
        return ToolUse(tools or [], functions, True, several)
    return ToolUse(tools or [], [_chosen(choice, functions)], True, False)


def _chosen(choice: Any, functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        form = '{"type": "function", "function": {"name": …}}'
        raise _refused("tool_choice", f'tool_choice is "auto", "none", "required" or {form}')
    found = next((function for function in functions if function["name"] == name), None)
    if found is None:
        raise _refused("tool_choice", f"tool_choice names {str(name)[:80]!r}, which is none of the tools")
    return found


def _function(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    where = f"tools[{index}]"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise _refused("tools", f'{where} isn\'t {{"type": "function", "function": …}}: other tools aren\'t supported')
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise _refused("tools", f"{where}.function.name is 1 to 64 letters, digits, _ and -")
    if not isinstance(function.get("parameters"), (dict, type(None))):
        raise _refused("tools", f"{where}.function.parameters is a JSON schema")
    return function


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
