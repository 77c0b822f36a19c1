"""Finds stop strings in streamed text. Text is certain once no stop string can begin in it."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError


class StopChecker:
    """Cuts a stream of text at the first complete stop string. If several end at the same place, the longest counts.

    The result depends on the text alone, not on how it is split into pieces. ``include_stop`` keeps the stop string.

    Raises:
        UsageError: a stop string is empty or isn't a string.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(f"stop is {stops!r}", hint='stop is a list of non-empty strings such as ["\\n\\n"]')
        self.stopped = False
        self._stops = tuple(dict.fromkeys(stops))
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> str:
        """Adds text. Returns the text that became certain; nothing after a stop string."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), -len(stop)) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            end, negative_length = min(ends)
            self.stopped = True
            return self._release(end if self._include_stop else end + negative_length)
        return self._release(len(self._held) - self._uncertain())

    def flush(self) -> str:
        """Ends the stream. Returns the text held back; nothing after a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        return certain

    def _uncertain(self) -> int:
        """Returns the length of the longest suffix that could begin a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
