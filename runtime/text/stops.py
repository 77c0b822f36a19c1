"""Finds stop strings in streamed text. Text is certain once no stop string can begin in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from ..errors import PromptError, UsageError
from .unicode import check_text


class StopChecker:
    """Cuts a stream of text at the first complete stop string. If several end at the same place, the longest counts.

    The result depends on the text alone, not on how it is split into pieces. ``include_stop`` keeps the stop string.

    Raises:
        UsageError: a stop string is empty or isn't text.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"stop is {stops!r}", hint='stop is a list of non-empty strings such as ["\\n\\n"]', argument="stop")
        try:
            for stop in stops:
                check_text(stop, "a stop string")
        except PromptError as error:
            raise UsageError(error.message, hint=error.hint, argument="stop") from None
        self.stopped = False
        self.stops = tuple(dict.fromkeys(stops))
        self._include_stop = include_stop
        self._held = ""
        self._shown: list[bool] = []  # of each character of the held text

    def meets(self, literal: str) -> bool:
        """Says whether a special token's ``literal`` is a stop string or a part of one. A stop string inside it doesn't count."""
        return any(literal in stop for stop in self.stops)

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Adds text. Returns the text that became certain; nothing after a stop string.

        ``hidden``: the text is the literal of a special token. Stop strings are found in it. It is returned only as part of a
        stop string that is kept.
        """
        if self.stopped:
            return ""
        if not self.stops:
            return "" if hidden else text
        self._held += text
        self._shown += [not hidden] * len(text)
        ends = [(start + len(stop), -len(stop)) for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if ends:
            end, negative_length = min(ends)
            self.stopped = True
            before = self._release(end + negative_length)
            return before + self._held[:-negative_length] if self._include_stop else before
        return self._release(len(self._held) - self._uncertain())

    def flush(self) -> str:
        """Ends the stream. Returns the text held back; nothing after a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        shown, self._shown = self._shown[:length], self._shown[length:]
        return certain if all(shown) else "".join(compress(certain, shown))

    def _uncertain(self) -> int:
        """Returns the length of the longest suffix that could begin a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
