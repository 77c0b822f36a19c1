"""Converts text to token ids and back, and decodes streams. Imports ``tokenizers`` when a tokenizer is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BundleError, MissingDependencyError, PromptError

MAX_TOKENIZER_BYTES = 256 << 20
_UNKNOWN = "\ufffd"
"""Stands in decoded text for bytes that are not UTF-8, or not yet."""


class TextCodec:
    """The tokenizer of a ``tokenizer.json``.

    It reads a special token wherever its literal stands in a text. Decoded text never holds special tokens.

    Raises:
        BundleError: the file can't be read.
        MissingDependencyError: ``tokenizers`` isn't installed.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingDependencyError(
                "text needs the package tokenizers", hint="pip install 'medusa-deploy[cpu]', or give token ids"
            ) from None
        hint = "copy or export the bundle again"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BundleError(f"can't read {path}: {error.strerror}", hint=hint) from None
        if size > MAX_TOKENIZER_BYTES:
            raise BundleError(f"{path} has {size} bytes, over the limit of {MAX_TOKENIZER_BYTES}", hint="don't use this bundle")
        try:
            self._tokenizer: Any = Tokenizer.from_file(os.fsencode(path).decode("utf-8", "surrogateescape"))
        except Exception as error:  # noqa: BLE001 tokenizers raises nothing more specific
            raise BundleError(f"{path} is not a tokenizer: {error}", hint=hint) from None
        # The file may hold training settings that would cut or pad a prompt without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes ``text`` as token ids.

        ``add_special_tokens`` adds the tokens that the tokenizer puts around a text, such as a begin-of-sequence token. A chat
        template has written them already.

        Raises:
            PromptError: ``text`` isn't a string, or isn't valid Unicode.
        """
        if not isinstance(text, str):
            raise PromptError(f"the prompt is of type {type(text).__name__}", hint="give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"character {error.start} of the prompt is half of a surrogate pair", hint="decode the text before it is sent"
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes all ``ids`` together. An id that the tokenizer doesn't know adds no text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decoder(self) -> StreamDecoder:
        """Makes a decoder for one stream of token ids."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids as they come. The pieces add up to ``codec.decode`` of all ids.

    A token's text depends on its neighbours: a leading space, a character spread over several tokens. Each call therefore decodes
    a window of ids: those after the last place where the text was complete, with the ids before that place as context.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._context = 0  # ids at the start of the window whose text was returned
        self._out = 0  # characters of the window's text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids. Returns the text that can't change any more: whole characters only."""
        if not ids:
            return ""
        self._window.extend(ids)
        text = self._codec.decode(self._window)
        complete = text.rstrip(_UNKNOWN)
        added = complete[self._out :]
        self._out = max(self._out, len(complete))
        if added and len(complete) == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._out = len(self._codec.decode(self._window))
        return added

    def flush(self) -> str:
        """Ends the stream. Returns the text held back; bytes that never became a character are U+FFFD."""
        text = self._codec.decode(self._window)
        added = text[self._out :]
        self._out = max(self._out, len(text))
        return added
