"""Reads calibration data as token ids: prompts from JSON lines, or pieces of plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...runtime.errors import CalibrationError
from ...runtime.files.manifest import Manifest
from ...runtime.request import Request
from ...runtime.text.prompts import MAX_FILE_BYTES, PromptLine, read_prompts

JSON_LINES = (".jsonl", ".ndjson", ".json")
_LONGEST_PIECE = 512
_HINT = f"give UTF-8 text, or JSON lines in a file that ends in {JSON_LINES[0]}"


class TextSource(Protocol):
    """Turns text into a bundle's token ids. A session does."""

    manifest: Manifest

    @property
    def codec(self) -> Any: ...

    def encode(self, request: Request) -> list[int]: ...


def read_samples(source: TextSource, path: Path, count: int | None, max_new_tokens: int) -> list[list[int]]:
    """Read the first ``count`` samples of a file (None: all).

    Files that end in .jsonl, .ndjson or .json hold a prompt a line (:mod:`...runtime.text.prompts`). The first of every category
    come first, then the second ones, and so on. Other files are text: every paragraph is a sample. It is cut into pieces of at
    most 512 tokens that leave room in a slot for ``max_new_tokens``.

    Raises:
        PromptFileError, PromptError: a line isn't a prompt of this bundle.
        CalibrationError: the file can't be read, is no text, or has fewer samples than ``count``.
    """
    if path.suffix.lower() in JSON_LINES:
        lines = categories_in_turn(read_prompts(path))
        samples: list[list[int]] = [source.encode(line.request()) for line in lines[:count]]
    else:
        samples = _pieces(source, _read_text(path), max_new_tokens)[:count]
    if not samples or (count is not None and len(samples) < count):
        asked = "" if count is None else f", asked for {count}"
        raise CalibrationError(f"{path} holds {len(samples)} samples{asked}", hint="give fewer --samples, or more data")
    return samples


def categories_in_turn(lines: Sequence[PromptLine]) -> list[PromptLine]:
    """Order lines so that categories take turns, each category in its own order. Lines without one are a category.

    Few prompts have to cover all kinds: ranges that were measured without code are less than half as wide as code needs.
    """
    rounds = Counter[str | None]()
    numbered = []
    for line in lines:
        rounds[line.category] += 1
        numbered.append((rounds[line.category], line))
    return [line for _, line in sorted(numbered, key=lambda entry: entry[0])]


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CalibrationError(f"{path} has {size} bytes, over the limit of {MAX_FILE_BYTES}", hint="split the file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"can't read {path}: {error.strerror}", hint=_HINT) from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text: byte {error.start} isn't UTF-8", hint=_HINT) from None
    if "\0" in text:
        raise CalibrationError(f"{path} is not text: it holds a zero byte", hint=_HINT)
    return text


def _pieces(source: TextSource, text: str, max_new_tokens: int) -> list[list[int]]:
    if source.codec is None:
        raise CalibrationError("text needs a tokenizer, and the bundle has none", hint='give JSON lines of {"token_ids": [1, 2]}')
    longest = max(1, min(_LONGEST_PIECE, source.manifest.limits.capacity - max_new_tokens))
    return [
        piece
        for paragraph in text.replace("\r\n", "\n").split("\n\n")
        if paragraph.strip()
        for piece in _cut(source.codec.encode(paragraph.strip(), add_special_tokens=True), longest)
    ]


def _cut(tokens: Sequence[int], longest: int) -> list[list[int]]:
    return [list(tokens[start : start + longest]) for start in range(0, len(tokens), longest)]
