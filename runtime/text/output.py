"""Tokens of one sequence to text that is certain: no half character, and no part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .stops import StopChecker

if TYPE_CHECKING:
    from .tokenizer import TextCodec


class TextOutput:
    """Turns emitted tokens into text, stop strings applied. Special tokens are no text, but a stop string may hold them."""

    def __init__(self, codec: TextCodec | None, stops: StopChecker, eos_token_ids: frozenset[int]) -> None:
        """``codec``: None leaves all text empty. ``eos_token_ids``: tokens that are no text."""
        self._decoder = None if codec is None else codec.decoder()
        self._stops, self._eos = stops, eos_token_ids
        literals = {} if codec is None else {**codec.special_tokens, **{token: codec.literal(token) for token in eos_token_ids}}
        self._literals = {token: text for token, text in literals.items() if text and stops.meets(text)}
        self.unread = 0
        """Tokens of the newest ``push`` behind the one that completed a stop string."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.stopped

    def push(self, tokens: list[int]) -> str:
        """Return the text of newly emitted tokens, as far as it is certain."""
        if self._decoder is None:
            return ""
        if not self._stops.stops:
            return self._decoder.push([token for token in tokens if token not in self._eos])
        text = ""
        for count, token in enumerate(tokens, start=1):
            if (literal := self._literals.get(token)) is not None:
                text += self._stops.push(self._decoder.flush()) + self._stops.push(literal, hidden=True)
            elif token not in self._eos:
                text += self._stops.push(self._decoder.push([token]))
            if self.stopped:
                self.unread = len(tokens) - count
                break
        return text

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        tail = "" if self._decoder is None else self._decoder.flush()
        return self._stops.push(tail) + self._stops.flush()
