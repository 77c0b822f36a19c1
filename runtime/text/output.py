"""Tokens of one sequence to text that is certain: no half character, and no part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .stops import StopChecker

if TYPE_CHECKING:
    from .tokenizer import StreamDecoder


class TextOutput:
    """Turns emitted tokens into text, stop strings applied."""

    def __init__(self, decoder: StreamDecoder | None, stops: StopChecker, eos_token_ids: frozenset[int]) -> None:
        """``decoder``: None leaves all text empty. ``eos_token_ids``: tokens that are no text."""
        self._decoder, self._stops, self._eos = decoder, stops, eos_token_ids

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.stopped

    def push(self, tokens: list[int]) -> str:
        """Return the text of newly emitted tokens, as far as it is certain."""
        text = "" if self._decoder is None else self._decoder.push([token for token in tokens if token not in self._eos])
        return self._stops.push(text)

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        tail = "" if self._decoder is None else self._decoder.flush()
        return self._stops.push(tail) + self._stops.flush()
