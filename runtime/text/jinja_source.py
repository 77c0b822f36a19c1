"""Rewrites the source of a chat template so that minijinja reads it as jinja2 with transformers' settings does.

What is rewritten: line ends, ``generation`` tags, the newline behind ``raw``, escapes in strings, a plus in front of a number,
``%`` behind a string, the names of ``default``'s arguments, and methods that minijinja's strings lack:
``a.b.title()`` becomes ``(a.b|_method("title"))``. Products become ``_times``, which knows how much it repeats, unless both sides
are numbers. Lines stay where they are.

minijinja hands undefined values over to Python as None: filters and tests get ``_undefined`` instead. It hands 1.0 over as 1:
``_json`` gets what minijinja's own ``tojson`` wrote.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from .jinja_writer import CLOSERS, UnsupportedError, written

_TAG = re.compile(r"\{[{%#]")
_RAW = re.compile(r"(\{%[-+]?\s*raw\s*)(-?)%\}(.*?)(\{%[-+]?\s*endraw\s*[-+]?%\})", re.DOTALL)
_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d+)?)"""
    r"""|(?P<name>\w+)|(?P<operator>\*\*|//|==|!=|>=|<=|.)""",
    re.DOTALL,
)
_TAGS = {"generation": "with", "endgeneration": "endwith", "filter tojson": "tojson|_json"}
"""Tags and what their last words become. ``generation`` marks the assistant's text for training, in a scope of its own."""
_MOST_TOKENS = 4000
"""Limit for the words of a tag, and for the branches of a template: minijinja's stack overflows at some four times as many."""
_EXTRA_ARGUMENTS = ("varargs", "kwargs")


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
        depth += (text in CLOSERS) - (text in CLOSERS.values())
        tokens.append((str(match.lastgroup), text))
        position = match.end()
    return tokens, 0


def _rewritten(tokens: list[tuple[str, str]]) -> str:
    names = [index for index, (kind, _) in enumerate(tokens) if kind not in ("space", "end")]
    head = [tokens[index][1] for index in names]
    if head and tokens[-1][1].endswith("%}") and (new := _TAGS.get(" ".join(head[head[0] in "-+" :]))):
        return "".join(new if text == head[-1] else text for _, text in tokens)
    if head and head[0] in "-+" and names[0] == 0:  # whitespace control of the tag
        return head[0] + written(tokens[1:])
    return written(tokens)
