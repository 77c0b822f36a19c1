"""A submitted request, as its owner sees it: chunks, the result, and a way to cancel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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

    def __init__(
        self, sequence: Sequence, output: TextOutput, driver: Driver, notify: Callable[[], object] | None = None
    ) -> None:
        """``notify``: called by the thread that runs the loop, after each new chunk and at the end. It must not raise or wait."""
        self._sequence, self._output, self._driver, self._notify = sequence, output, driver, notify
        self._chunks: deque[Chunk] = deque()
        self._text: list[str] = []
        self._given = sequence.prompt_length  # tokens up to here were handed over
        self._last: Chunk | None = None  # set in one go when the request ends

    @property
    def done(self) -> bool:
        """Whether the request has ended and its slot is free."""
        return self._last is not None

    @property
    def error(self) -> Exception | None:
        """The error that ended it, if one did."""
        return self._sequence.error if self.done else None

    @property
    def last(self) -> Chunk | None:
        """The chunk with the finish reason; None while the request is under way."""
        return self._last

    def cancel(self) -> None:
        """End the request before its next step; what was emitted stays."""
        if not self.done:
            self._sequence.cancelled = True
            self._driver.settle()

    def abort(self, error: Exception) -> None:
        """End the request with ``error`` before its next step; what was emitted stays."""
        if not self.done:
            self._sequence.fail(error)
            self._driver.settle()

    def take(self) -> Chunk | None:
        """Return the next chunk if one lies ready, without waiting. The last chunk isn't among them: see :attr:`last`."""
        try:
            return self._chunks.popleft()
        except IndexError:  # nothing yet, or another thread has read it
            return None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks as they are emitted, each to one reader, and the one with the finish reason last, to every reader.

        Raises:
            Exception: the error that ended the request.
        """
        while not self.done or self._chunks:
            self._driver.until(lambda: bool(self._chunks) or self.done)
            if (chunk := self.take()) is not None:
                yield chunk
        assert self._last is not None
        yield self._last
        if self._sequence.error is not None:
            raise self._sequence.error

    def wait(self) -> Generation:
        """Run to the end and return the generation, one that ended with an error too."""
        self._driver.until(lambda: self.done)
        sequence = self._sequence
        assert sequence.finish_reason is not None and self._last is not None
        hidden = np.stack(sequence.hidden[: len(sequence.emitted)]) if sequence.keep_hidden and sequence.hidden else None
        prompt = sequence.tokens[: sequence.prompt_length]
        reason, stats = sequence.finish_reason, sequence.stats
        text = "".join(self._text) + self._last.text
        return Generation(text, sequence.emitted, reason, prompt, stats, hidden, sequence.error, sequence.logprobs)

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

    def put(self) -> None:
        """Hand newly emitted tokens over, as text as far as it is certain."""
        sequence, given = self._sequence, self._given
        tokens = sequence.tokens[given:]
        if tokens:
            text = self._checked(lambda: self._output.push(tokens))
            if self._output.unread:
                sequence.cut(self._output.unread)
                tokens = sequence.tokens[given:]
            self._given += len(tokens)
            self._text.append(text)
            logprobs = None if sequence.logprobs is None else sequence.logprobs[given - sequence.prompt_length :]
            self._chunks.append(Chunk(text, tokens, logprobs=logprobs))
            self._tell()

    def end(self) -> None:
        """Hand the rest over, with the finish reason and the statistics. Does it once."""
        if not self.done:
            self.put()
            text = self._checked(self._output.flush)
            self._last = Chunk(text, [], self._sequence.finish_reason, self._sequence.stats)
        self._tell()  # again where an interrupt came between: whoever waits must hear of the end

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify()

    def _checked(self, decode: Callable[[], str]) -> str:
        """Return the text of ``decode``. A stop string in it, or an error, ends the sequence."""
        sequence = self._sequence
        try:
            text = decode()
        except Exception as error:  # noqa: BLE001 - a tokenizer's errors have no common base
            if sequence.error is None:
                sequence.fail(error)
            return ""
        if self._output.stopped and sequence.finish_reason in (None, "length"):
            sequence.finish_reason = "stop"
        return text
