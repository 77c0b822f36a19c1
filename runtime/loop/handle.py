"""A submitted request, as its owner sees it: chunks, the result, and a way to cancel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..request import Chunk, Generation
from ..text.output import TextOutput
from .sequence import Sequence

if TYPE_CHECKING:
    from .driver import Driver


class Handle:
    """The outgoing side of one request, and the only part of the loop that other threads touch.

    Reading a handle drives the loop where nobody else does. A handle that isn't read goes on as long as others are.
    """

    def __init__(self, sequence: Sequence, output: TextOutput, driver: Driver) -> None:
        self._sequence, self._output, self._driver = sequence, output, driver
        self._chunks: deque[Chunk] = deque()
        self._text: list[str] = []
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether the request has ended and its slot is free."""
        return self._ended

    @property
    def error(self) -> Exception | None:
        """The error that ended it, if one did."""
        return self._sequence.error if self._ended else None

    def cancel(self) -> None:
        """End the request before its next step; what was emitted stays."""
        if not self._ended:
            self._sequence.cancelled = True
            self._driver.settle()

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks as they are emitted, the one with the finish reason last.

        Raises:
            Exception: the error that ended the request.
        """
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._ended and not self._chunks:
                break
            self._driver.until(lambda: bool(self._chunks) or self._ended)
        if self._sequence.error is not None:
            raise self._sequence.error

    def wait(self) -> Generation:
        """Run to the end and return the generation, one that ended with an error too."""
        self._driver.until(lambda: self._ended)
        sequence = self._sequence
        assert sequence.finish_reason is not None
        hidden = np.stack(sequence.hidden[: len(sequence.emitted)]) if sequence.keep_hidden and sequence.hidden else None
        prompt = sequence.tokens[: sequence.prompt_length]
        reason, stats = sequence.finish_reason, sequence.stats
        return Generation("".join(self._text), sequence.emitted, reason, prompt, stats, hidden, sequence.error)

    def result(self) -> Generation:
        """Run to the end and return the generation.

        Raises:
            Exception: the error that ended the request.
        """
        generation = self.wait()
        if generation.error is not None:
            raise generation.error
        return generation

    # -- the loop's side -------------------------------------------------------------------------------------------

    @property
    def sequence(self) -> Sequence:
        """The request's state; only the loop changes it."""
        return self._sequence

    def put(self, tokens: list[int]) -> None:
        """Hand newly emitted tokens over, as text as far as it is certain; a stop string ends the sequence."""
        text = self._output.push(tokens)
        if self._output.stopped and self._sequence.finish_reason in (None, "length"):
            self._sequence.finish_reason = "stop"
        self._text.append(text)
        self._chunks.append(Chunk(text, tokens))

    def end(self) -> None:
        """Hand the rest of the text over, with the finish reason and the statistics."""
        text = self._output.flush()
        self._text.append(text)
        self._chunks.append(Chunk(text, [], self._sequence.finish_reason, self._sequence.stats))
        self._ended = True
