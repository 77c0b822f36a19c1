"""Grammars: what an answer may be, and how one answer is followed through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from .arguments import shown
from .errors import GrammarError

GrammarKind = Literal["json_schema", "regex", "lark"]
KINDS = ("json_schema", "regex", "lark")

MAX_CHARS = 1 << 18
MAX_CHOICES = 4096
AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: llguidance's names for what ``json.dumps`` does."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """All answers that a request allows: a JSON schema, a regular expression, or a Lark grammar.

    JSON is written as Python's ``json.dumps`` writes it, with its members in the order of the schema.

    Raises:
        GrammarError: the kind isn't known, or the source isn't text, is empty or too long.
    """

    kind: GrammarKind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GrammarError(f"a grammar's kind is {shown(self.kind)}", hint=f"kinds: {', '.join(KINDS)}")
        if not isinstance(self.source, str) or not self.source:
            raise GrammarError(f"the source of a grammar is {shown(self.source)}", hint="give a text that isn't empty")
        if len(self.source) > MAX_CHARS:
            raise GrammarError(
                f"a grammar of {len(self.source)} characters, over the limit of {MAX_CHARS}", hint="write a smaller one"
            )
        if any(0xD800 <= ord(letter) < 0xE000 for letter in self.source if letter > "\ud7ff"):
            raise GrammarError("a grammar holds half a surrogate pair", hint="write it in valid Unicode")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str | None = None) -> Grammar:
        """Return the grammar of the JSON that ``schema`` describes; None: of any object.

        Raises:
            GrammarError: the schema isn't JSON.
        """
        import json

        given = {"type": "object"} if schema is None else {} if schema is True else schema
        try:
            return cls("json_schema", given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"a JSON schema isn't JSON: {error}", hint="give an object, true, or their text") from None

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """Return the grammar of one of ``texts``.

        Raises:
            GrammarError: there are none or too many, or one of them isn't a text.
        """
        import json

        choices = [texts] if isinstance(texts, str) else list(texts)
        if not 0 < len(choices) <= MAX_CHOICES or not all(isinstance(text, str) and text for text in choices):
            raise GrammarError(f"the choices are {shown(choices)}", hint=f"give 1 to {MAX_CHOICES} texts that aren't empty")
        return cls("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))


class Matcher(Protocol):
    """Follows one answer through its grammar.

    ``ahead``: tokens behind the emitted ones that are only considered. The matcher goes there and comes back by itself: what
    it answers depends on the emitted tokens and on ``ahead`` alone.
    """

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray:
        """Tokens that may follow ``ahead``, as bool [V]; an end-of-sequence token where the text may end.

        Raises:
            GrammarError: none may, or a limit is exceeded.
        """
        ...

    def admits(self, ahead: Sequence[int], token: int) -> bool:
        """Whether ``token`` may follow ``ahead``; no where ``ahead`` itself isn't allowed."""
        ...

    def only(self, ahead: Sequence[int] = ()) -> int | None:
        """The only token that may follow ``ahead``, if there is only one and ``ahead`` is allowed."""
        ...

    def finished(self, ahead: Sequence[int] = ()) -> bool:
        """Whether nothing but the end may follow ``ahead``."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Take ``tokens`` as emitted."""
        ...
