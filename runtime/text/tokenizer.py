"""Converts text to token ids and back, and decodes streams. Imports ``tokenizers`` when a tokenizer is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BundleError, MissingDependencyError
from .unicode import check_text

MAX_TOKENIZER_BYTES = 256 << 20
_UNKNOWN = "\ufffd"
"""Stands in decoded text for bytes that are not UTF-8, or not yet."""
_CONTEXT = 8
"""Ids kept as context. A character has at most 4 bytes, and an id that is text at least one."""


def _byte_letters() -> dict[str, int]:
    """Returns the byte of each letter that byte-level tokenizers write: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()


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
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens: dict[int, str] = {token: each.content for token, each in added.items() if each.special}
        """Literals of the special tokens by their ids. Decoded text doesn't hold them."""
        self._added: dict[int, str] = {token: each.content for token, each in added.items()}
        self._bytes = self._byte_tokens()
        decoder = b"" if self._tokenizer.decoder is None else self._tokenizer.decoder.__getstate__()
        self._byte_level, self._spaced = b'"ByteLevel"' in decoder, "▁".encode() in decoder or b'"Metaspace"' in decoder

    def _byte_tokens(self) -> frozenset[int]:
        """Returns the ids that the decoder reads as one byte each, in runs; none if it has no such ids."""
        decoder = self._tokenizer.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        names = {f"<0x{byte:02{digits}}>" for byte in range(256) for digits in "xX"}
        return frozenset(token for name in names if (token := self._tokenizer.token_to_id(name)) is not None)

    def json(self) -> str:
        """Returns the tokenizer as the text of a ``tokenizer.json``."""
        text: str = self._tokenizer.to_str()
        return text

    def literal(self, token: int) -> str | None:
        """Returns the text of an added token, special or not; None for any other id."""
        return self._added.get(token)

    def is_byte(self, token: int) -> bool:
        """Says whether the decoder reads this id as a byte. What a run of bytes becomes is certain only at its end."""
        return token in self._bytes

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that an id stands for within a text; none for an unknown id. A special token has its literal."""
        piece = self._added.get(token) or self._tokenizer.id_to_token(token)
        if piece is None or token in self._added:
            return (piece or "").encode()
        if token in self._bytes:
            return bytes([int(piece[3:-1], 16)])
        if self._byte_level and all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        return str(piece).replace("▁", " ").encode() if self._spaced else str(piece).encode()

    def unspaced(self) -> dict[int, int]:
        """Returns, for each id that is a text behind a space, the id of the text alone, where there is one."""
        spelt = {self.token_bytes(token): token for token in reversed(range(self._tokenizer.get_vocab_size()))}
        pairs = {token: spelt.get(text[1:]) for text, token in spelt.items() if text[:1] == b" " and len(text) > 1}
        return {token: alone for token, alone in pairs.items() if alone is not None}

    def is_text(self, token: int) -> bool:
        """Says whether decoded text shows the id: special tokens and unknown ids are left out."""
        return token not in self.special_tokens and self._tokenizer.id_to_token(token) is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes ``text`` as token ids.

        ``add_special_tokens`` adds the tokens that the tokenizer puts around a text, such as a begin-of-sequence token. A chat
        template has written them already.

        Raises:
            PromptError: ``text`` isn't a string, or isn't valid Unicode.
        """
        check_text(text, "the prompt")
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
    """Decodes ids as they come. The pieces add up to ``codec.decode`` of all ids, at a cost that is linear in their number.

    A token's text depends on its neighbours: a leading space, a character spread over several tokens. Each call therefore decodes
    a window of ids: those whose text isn't certain yet, behind some whose text was returned, as context.

    Two things keep text from being certain. The last U+FFFD may be the beginning of a character. A run of byte tokens
    (:meth:`TextCodec.is_byte`) becomes U+FFFD as a whole if it isn't UTF-8 at its end.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._new = 0  # ids at the end of the window that no call has decoded
        self._out = 0  # characters of the window's text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids. Returns the text that can't change any more: whole characters only."""
        new = [token for token in ids if self._codec.is_text(token)]
        self._window.extend(new)
        self._new += len(new)
        if not self._new or self._codec.is_byte(self._window[-1]):
            return ""
        text = self._codec.decode(self._window)
        held = 1 if text.endswith(_UNKNOWN) else 0
        added = text[self._out : len(text) - held]
        self._out = max(self._out, len(text) - held)
        if len(self._window) > 2 * _CONTEXT:
            # UTF-8 is in step again within 4 bytes, wherever the context begins: only the held character is missing.
            self._window = self._window[-_CONTEXT:]
            self._out = len(self._codec.decode(self._window)) - held
        self._new = 0
        return added

    def flush(self) -> str:
        """Ends the stream. Returns the text held back; bytes that never became a character are U+FFFD."""
        text = self._codec.decode(self._window)
        added = text[self._out :]
        self._out, self._new = max(self._out, len(text)), 0
        return added
