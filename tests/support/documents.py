"""Reads the project's documents, fenced blocks and the shell commands in them, and HTML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FIRST_BUNDLE = ROOT / "docs" / "first-bundle.md"
DOCS = sorted([*ROOT.glob("*.md"), *(path for name in ("docs", "heads", "benchmarks") for path in (ROOT / name).rglob("*.md"))])


def blocks(path: Path, *languages: str) -> list[str]:
    """Fenced blocks of a document in one of ``languages``."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def outside_blocks(path: Path) -> str:
    """The text of a document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_commands(path: Path) -> Iterator[list[str]]:
    """Commands of ``medusa-deploy`` in the running text of a document; a verb alone is none."""
    for found in re.findall(r"`(medusa-deploy [^`]+ [^`]+)`", outside_blocks(path)):
        yield shlex.split(found)


def commands(path: Path) -> Iterator[list[str]]:
    """Shell commands of a document; where a block marks them with ``$``, its other lines are output."""
    for block in blocks(path, "console", "bash", "sh", "shell"):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


class Reader(HTMLParser):
    """Tags that are open, and what a browser would run or fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(f"{tag} {name}" for name, _ in attrs)]
        if tag not in ("meta", "rect", "circle", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "circle", "line", "polyline"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(f"{tag} {name}" for name, _ in attrs)]

    def handle_data(self, data: str) -> None:
        self.words.append(data)
