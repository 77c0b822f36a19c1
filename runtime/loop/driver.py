"""Threads share one loop: whoever waits for something drives it, one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .loop import Loop


class Driver:
    """Lets threads run one loop. A step advances all requests, so threads that wait at once share their steps."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        # Re-entrant: the garbage collector may close a stream, which cancels it, in the middle of anything.
        self._changed = threading.Condition()
        self._led = False

    def until(self, ready: Callable[[], bool]) -> None:
        """Run the loop, or wait while another thread runs it, until ``ready`` says yes.

        Raises:
            SlotError: nothing runs, and all slots are held by others than the loop.
        """
        while not ready():
            with self._changed:
                while self._led and not ready():
                    self._changed.wait()
                if ready():
                    return
                self._led = True
            try:
                if not self._loop.tick() and not ready():
                    self._loop.slots.release(self._loop.slots.acquire())  # says that there is none
            finally:
                self._hand_over()

    def settle(self) -> None:
        """End what was cancelled, now where no thread runs the loop, else before its next step."""
        with self._changed:
            if self._led:
                return
            self._led = True
        try:
            self._loop.retire()
        finally:
            self._hand_over()

    def _hand_over(self) -> None:
        with self._changed:
            self._led = False
            self._changed.notify_all()
