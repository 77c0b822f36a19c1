"""Rewrites the source of a chat template so that minijinja reads it as jinja2 with transformers' settings does.

What is rewritten: line ends, ``generation`` tags, the newline behind ``raw``, escapes in strings, a plus in front of a number,
``%`` behind a string, the names of ``default``'s arguments, and methods that minijinja's strings lack:
``a.b.title()`` becomes ``(a.b|_method("title"))``. Lines stay where they are.

minijinja hands undefined values over to Python as None: filters and tests get ``_undefined`` instead. It hands 1.0 over as 1:
``_json`` gets what minijinja's own ``tojson`` wrote.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from .jinja_functions import FILTERS, FUNCTIONS, REWRITTEN_METHODS, TESTS

_TAG = re.compile(r"\{[{%#]")
_RAW = re.compile(r"(\{%[-+]?\s*raw\s*)(-?)%\}(.*?)(\{%[-+]?\s*endraw\s*[-+]?%\})", re.DOTALL)
_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+)?)"""
    r"""|(?P<name>\w+)|(?P<operator>\*\*|//|==|!=|>=|<=|.)""",
    re.DOTALL,
)
_OPERATOR_NAMES = frozenset(("and", "or", "not", "in", "if", "else"))
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_ESCAPES = frozenset("\n\\'\"abfnrtvxNuU01234567")
_DEFAULTS = ("default_value", "boolean")
_KNOWN = "|default(_undefined)"
_FUNCTIONS = frozenset((*FUNCTIONS, "range", "namespace"))
_BEFORE = {"center": "|string", "wordcount": "|string", "tojson": "|default(_no_json)"}
_TAGS = {"generation": "with", "endgeneration": "endwith", "filter tojson": "tojson|_json"}
"""Tags and what their last words become. ``generation`` marks the assistant's text for training, in a scope of its own."""
_MOST_TOKENS = 4000
"""Limit for the words of a tag, and for the branches of a template: minijinja's stack overflows at some four times as many."""
_EXTRA_ARGUMENTS = ("varargs", "kwargs")


class UnsupportedError(Exception):
    """Says what a template needs that minijinja has not."""


def rewrite(source: str) -> str:
    """Return the source that minijinja reads. What can't be tokenised stays as it is, for minijinja to refuse.

    Raises:
        UnsupportedError: minijinja would render the template otherwise than jinja2, and no rewriting helps.
    """
    source = re.sub(r"\r\n?", "\n", source)
    out, position, macros, branches = [], 0, _Macros(), 0
    while tag := _TAG.search(source, position):
        start = tag.start()
        out.append(source[position:start])
        if tag.group() == "{#":
            end = source.find("#}", start) + 2
            out.append(source[start : end if end > 1 else len(source)])
        elif raw := _RAW.match(source, start):
            begin, dash, text, ending = raw.groups()
            out.append(f"{begin}{dash or '+'}%}}{text}{ending}")  # jinja2 keeps a newline behind raw
            end = raw.end()
        else:
            tokens, end = _tokens(source, tag.end(), "}}" if tag.group() == "{{" else "%}")
            try:
                branches += "elif" in (text for _, text in tokens[:3])
                if len(tokens) > _MOST_TOKENS or branches > _MOST_TOKENS:
                    raise UnsupportedError(f"has a tag, or an if, of more than {_MOST_TOKENS} parts")
                macros.read([text for kind, text in tokens if kind != "space"])
                out.append(tag.group() + (_rewritten(tokens) if end else source[tag.end() :]))
            except UnsupportedError as error:
                raise UnsupportedError(f"line {source.count(chr(10), 0, start) + 1} of the chat template {error}") from None
        if end < 2:
            return "".join(out)
        position = end
    return "".join([*out, source[position:]])


@dataclass(slots=True)
class _Macros:
    """Looks for macros that read the arguments which they don't declare."""

    depth: int = 0
    assigned: set[str] = field(default_factory=set)

    def read(self, tokens: list[str]) -> None:
        """Read the tokens of one tag."""
        head = next((text for text in tokens if text not in "-+"), "")
        if head in ("macro", "set", "for"):
            self.assigned.update(itertools.takewhile(lambda text: head == "macro" or text not in ("=", "in"), tokens))
        self.depth += (head == "macro") - (head == "endmacro")
        for index, name in enumerate(tokens):
            read = name in _EXTRA_ARGUMENTS and tokens[index - 1] != "." and tokens[index + 1 : index + 2] != ["="]
            if self.depth > 0 and read and name not in self.assigned:
                raise UnsupportedError(f"reads {name} in a macro, which minijinja doesn't have")


def _tokens(source: str, position: int, closer: str) -> tuple[list[tuple[str, str]], int]:
    """Split the inside of a tag. Return kinds and texts of its tokens, its end included, and the position behind; 0: no end."""
    tokens: list[tuple[str, str]] = []
    depth = 0
    while position < len(source):
        if depth <= 0:
            for end in (closer, f"-{closer}", f"+{closer}"):
                if source.startswith(end, position):
                    return [*tokens, ("end", end)], position + len(end)
        match = _TOKEN.match(source, position)
        if match is None:
            break
        text = match.group()
        depth += (text in _CLOSERS) - (text in _CLOSERS.values())
        tokens.append((str(match.lastgroup), text))
        position = match.end()
    return tokens, 0


@dataclass(slots=True)
class _Level:
    """One level of brackets: where its newest operand begins in the output, and whether it is complete."""

    start: int = 0
    operand: bool = False
    after: str = ""  # written behind the closing bracket
    pending: bool = False  # whether the newest operand is the right side of a format
    drops: tuple[str, ...] = ()  # names of arguments that are dropped: minijinja takes them by position


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
        level.start, level.operand = len(self.out), True

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
            self.finish_format()
            self.out.append(text)
        elif kind == "string":
            if not (level.operand and self.out and self.out[-1][-1:] in "'\""):  # strings side by side are one
                self.begin()
            self.out.append(_string(text))
        elif kind in ("number", "name"):
            return self.name(index)
        elif text in _CLOSERS:
            if not level.operand:
                self.begin()
            self.out.append(text)
            self.levels.append(_Level(len(self.out)))
        elif text in _CLOSERS.values():
            self.finish_format()
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
            self.finish_format()
            level.operand = False
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
        newest = "".join(self.out[level.start :]).rstrip() if text == "%" and level.operand else ""
        if newest[:1] in ("'", '"') and newest == self.out[level.start]:
            self.out.insert(level.start, "(")
            self.out.append("|_percent(")
            level.pending, level.operand = True, False
            return index + 1
        self.finish_format()
        if not (text == "+" and not level.operand):
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


def _rewritten(tokens: list[tuple[str, str]]) -> str:
    names = [index for index, (kind, _) in enumerate(tokens) if kind not in ("space", "end")]
    head = [tokens[index][1] for index in names]
    if head and tokens[-1][1].endswith("%}") and (new := _TAGS.get(" ".join(head[head[0] in "-+" :]))):
        return "".join(new if text == head[-1] else text for _, text in tokens)
    if head and head[0] in "-+" and names[0] == 0:  # whitespace control of the tag
        return head[0] + _Writer(tokens[1:]).write()
    return _Writer(tokens).write()


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
