"""Writes the tokens of one tag of a chat template as minijinja has to read them; see :mod:`.jinja_source`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .jinja_functions import FILTERS, FUNCTIONS, REWRITTEN_METHODS, TESTS

CLOSERS = {"(": ")", "[": "]", "{": "}"}
_OPERATOR_NAMES = frozenset(("and", "or", "not", "in", "if", "else"))
_PRODUCTS = ("*", "/", "//", "%")
_FRACTION = re.compile(r"\s*[\d_]+\.\d+\s*")
_TWICE = re.compile(r"\n|_times\(|[\w\])]\s*\(|\bis\b")
_ESCAPES = frozenset("\n\\'\"abfnrtvxNuU01234567")
_DEFAULTS = ("default_value", "boolean")
_KNOWN = "|default(_undefined)"
_FUNCTIONS = frozenset((*FUNCTIONS, "range", "namespace"))
_BEFORE = {"center": "|string", "wordcount": "|string", "tojson": "|default(_no_json)"}


class UnsupportedError(Exception):
    """Says what a template needs that minijinja has not."""


def written(tokens: list[tuple[str, str]]) -> str:
    """Return the tokens, kinds and texts, as minijinja reads them.

    Raises:
        UnsupportedError: minijinja would render one of them otherwise than jinja2.
    """
    return _Writer(tokens).write()


@dataclass(slots=True)
class _Level:
    """One level of brackets: where its newest operand begins in the output, and whether it is complete."""

    start: int = 0
    operand: bool = False
    after: str = ""  # written behind the closing bracket
    pending: bool = False  # whether the newest operand is the right side of a format
    drops: tuple[str, ...] = ()  # names of arguments that are dropped: minijinja takes them by position
    term: int | None = None  # where the newest product or quotient begins
    factors: list[str] = field(default_factory=list)  # of a product whose last one is being written, from ``term`` on


@dataclass(slots=True)
class _Writer:
    """Writes the tokens of one tag."""

    tokens: list[tuple[str, str]]
    out: list[str] = field(default_factory=list)
    levels: list[_Level] = field(default_factory=lambda: [_Level()])

    def ahead(self, index: int) -> int:
        """Return the index of the next token that isn't space."""
        while self.tokens[index][0] == "space":
            index += 1
        return index

    def text(self, index: int) -> str:
        return self.tokens[index][1]

    def begin(self) -> None:
        level = self.levels[-1]
        if level.term is None or (level.operand and not level.factors):
            level.term = len(self.out)
        level.start, level.operand = len(self.out), True

    def finish(self) -> None:
        """Close a format and a product behind their right sides."""
        self.finish_format()
        self.finish_product()

    def finish_product(self) -> None:
        """Write a product behind its right side."""
        level = self.levels[-1]
        if level.factors and level.term is not None:
            self.out[level.term :] = [_product([*level.factors, "".join(self.out[level.term :])])]
            level.factors, level.start = [], level.term

    def finish_format(self) -> None:
        """Close a format behind its right side."""
        level = self.levels[-1]
        if level.pending and level.operand:
            self.out.append(_KNOWN + "))")
            level.pending = False

    def write(self) -> str:
        index = 0
        while index < len(self.tokens):
            index = self.token(index)
        return "".join(self.out)

    def token(self, index: int) -> int:
        """Write one token, or a few that belong together. Return the index of the next."""
        kind, text = self.tokens[index]
        level = self.levels[-1]
        if kind == "space":
            self.out.append(text)
        elif kind == "end":
            self.finish()
            self.out.append(text)
        elif kind == "string":
            if not (level.operand and self.out and self.out[-1][-1:] in "'\""):  # strings side by side are one
                self.begin()
            self.out.append(_string(text))
        elif kind in ("number", "name"):
            return self.name(index)
        elif text in CLOSERS:
            if not level.operand:
                self.begin()
            self.out.append(text)
            self.levels.append(_Level(len(self.out)))
        elif text in CLOSERS.values():
            self.finish()
            after = self.levels.pop().after if len(self.levels) > 1 else ""
            self.out.append(text + after)
            self.levels[-1].operand = True
        else:
            return self.operator(index)
        return index + 1

    def name(self, index: int) -> int:
        text, level = self.text(index), self.levels[-1]
        if text == "is" and level.operand:
            self.finish_format()
            return self.test(index)
        if text in _OPERATOR_NAMES:
            self.finish()
            level.operand, level.term = False, None
        elif text in level.drops and self.text(self.ahead(index + 1)) == "=":
            return self.ahead(index + 1) + 1
        else:
            self.begin()
            if self.tokens[index][0] == "number":
                _check_number(text)
        self.out.append(text)
        return index + 1

    def test(self, index: int) -> int:
        """Write ``is``, ``not`` and the test's name."""
        end, level = self.ahead(index + 1), self.levels[-1]
        if self.text(end) == "not":
            end = self.ahead(end + 1)
        name = self.text(end)
        if name in TESTS:
            self.out.append(_KNOWN + " ")
        elif name == "callable" and "".join(self.out[level.start :]).strip() in _FUNCTIONS:
            name = "defined"
        self.out += [*(text for _, text in self.tokens[index:end]), name]
        level.operand = False
        return end + 1

    def operator(self, index: int) -> int:
        text, level = self.text(index), self.levels[-1]
        follower = self.ahead(index + 1)
        if level.operand and text == ".":
            return self.attribute(index, follower)
        if level.operand and text == "|":
            return self.filter(index, follower)
        if level.operand and text in _PRODUCTS[1:]:
            self.finish_product()
        newest = "".join(self.out[level.start :]).rstrip() if text == "%" and level.operand else ""
        if newest[:1] in ("'", '"') and newest == self.out[level.start]:
            self.out.insert(level.start, "(")
            self.out.append("|_percent(")
            level.pending, level.operand = True, False
            return index + 1
        self.finish_format()
        if text == "*" and level.operand and level.term is not None:
            level.factors.append("".join(self.out[level.term :]))
            del self.out[level.term :]
        elif level.operand or text != "+":
            if level.operand and text not in ("**", *_PRODUCTS):
                self.finish_product()
                level.term = None
            elif not level.operand and text == "-" and level.term is None:
                level.term = len(self.out)
            self.out.append(text)
        level.operand = False
        return index + 1

    def filter(self, index: int, name: int) -> int:
        """Write a bar and a filter's name, with the opening bracket where its arguments are changed."""
        text = self.text(name)
        if text in FILTERS or text in _BEFORE:
            self.out.append(_BEFORE.get(text, _KNOWN))
        self.out += [each for _, each in self.tokens[index : name + 1]]
        if text == "tojson":
            self.out.append("|_json")
            return name + 1
        call = self.ahead(name + 1) if self.tokens[name][0] == "name" else name
        if self.text(call) != "(":
            return name + 1
        first = self.ahead(call + 1)
        if text in ("default", "d"):
            self.out.append("(")
            self.levels.append(_Level(len(self.out), drops=_DEFAULTS))
            return call + 1
        if text == "map" and self.text(first)[1:-1] == "tojson":
            self.out.append('("tojson")|map("_json"')
            self.levels.append(_Level(len(self.out), operand=True))
            return first + 1
        return name + 1

    def attribute(self, index: int, name: int) -> int:
        """Write a dot and a name, or a call of a method by the filter that stands for it."""
        call = self.ahead(name + 1) if self.tokens[name][0] == "name" else name
        if self.text(name) not in REWRITTEN_METHODS or self.text(call) != "(":
            self.out += [text for _, text in self.tokens[index : name + 1]]
            return name + 1
        first = self.ahead(call + 1)
        self.out.insert(self.levels[-1].start, "(")
        self.out.append(f'|_method("{self.text(name)}"' + ("" if self.text(first) == ")" else ", "))
        self.levels.append(_Level(len(self.out), after=")"))
        return call + 1


def _product(factors: list[str]) -> str:
    """Return the product of operands: of numbers as minijinja multiplies, which keeps 2.0 apart from 2."""
    space = factors[-1][len(factors[-1].rstrip()) :]
    if any(_FRACTION.fullmatch(factor) for factor in factors):
        return "*".join(factors)
    first, *others = [factor.strip() for factor in factors]
    repeated = f"({first})" + "".join(f"|_times({other})" for other in others)
    if any(_TWICE.search(factor) for factor in factors):  # must not be written, or evaluated, several times
        return f"({repeated}){space}"
    numbers = " and ".join(f"({factor}) is number" for factor in (first, *others))
    return f"({' * '.join((first, *others))} if {numbers} else {repeated}){space}"


def _check_number(text: str) -> None:
    """Refuse a number that minijinja writes otherwise than Python: with a fraction or exponent, and very large or small."""
    if not text.replace("_", "").isdigit() and re.search("e|inf", repr(float(text))):
        raise UnsupportedError(f"has the number {text}, which minijinja writes in another form")


def _string(text: str) -> str:
    """Return a string literal that means to minijinja what ``text`` means to jinja2."""
    if "\\" not in text:
        return text
    known = re.sub(r"(?s)\\(.)", lambda match: match.group() if match[1] in _ESCAPES else "\\" + match.group(), text[1:-1])
    try:
        value = known.encode("ascii", "backslashreplace").decode("unicode-escape")
        value.encode()
    except UnicodeError:
        return text
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
