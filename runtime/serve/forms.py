"""The forms that an answer can be asked for in: JSON, and other servers' names for regular expressions, choices and grammars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GrammarError
from ..grammar import Grammar
from .errors import ApiError

FORMS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class Form:
    """A form: the field that asks for it, its kind, and its value."""

    field: str
    kind: str
    value: Any

    def grammar(self) -> Grammar:
        """Return the grammar of it.

        Raises:
            ApiError: it isn't one.
        """
        value = self.value
        try:
            if self.kind == "choice":
                return Grammar.choice(value if isinstance(value, list) else [])
            if self.kind in ("regex", "grammar"):
                return Grammar("regex" if self.kind == "regex" else "lark", value)
            return Grammar.json(None if self.kind == "json_object" else value)
        except GrammarError as error:
            raise ApiError(400, f"{self.field}: {error.message}", param=self.field, code="invalid_grammar") from None


def asked_form(given: Mapping[str, Any]) -> Form | None:
    """Return the form that a request asks for; None for free text. ``given``: the values of the fields in ``FORMS``.

    Raises:
        ApiError: several are asked for, or one that doesn't exist.
    """
    asked = [form for name, value in given.items() if value is not None and (form := _form(name, value)) is not None]
    if len(asked) > 1:
        message = f"{' and '.join(form.field for form in asked)} ask for different forms; give one of them"
        raise ApiError(400, message, param=asked[1].field, code="invalid_value")
    return asked[0] if asked else None


def _form(field: str, value: Any) -> Form | None:
    if field.startswith("guided_"):
        return Form(field, field.removeprefix("guided_"), value)
    if field == "response_format":
        return _response_format(value)
    kinds = [kind for kind, each in value.items() if each not in (None, False)]
    if len(kinds) != 1 or kinds[0] not in _KINDS:
        raise ApiError(400, f"{field} has one of {', '.join(_KINDS)}", param=field, code="invalid_value")
    return Form(field, kinds[0], value[kinds[0]])


def _response_format(value: dict[str, Any]) -> Form | None:
    field, kind = "response_format", value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form(field, "json_object", True)
    if kind != "json_schema":
        message = f"response_format.type is {kind!r}; it is text, json_object or json_schema"
        raise ApiError(400, message, param=field, code="invalid_value")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise ApiError(400, "response_format.json_schema.schema is a JSON schema", param=field, code="invalid_value")
    return Form(field, "json", schema)
