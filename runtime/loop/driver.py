"""Threads share one loop: whoever waits for something drives it, one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..errors import UsageError
from .loop import Loop


class Driver:
    """Lets threads run one loop. A step advances all requests, so threads that wait at once share their steps.

    One thread leads at a time. An interrupt (Ctrl-C) may come between any two calls, and the garbage collector may close a
    stream, which cancels it, in the middle of anything. So the lock is re-entrant, a leader gives the lead up in ``finally``, and
    there is no threading.Condition: an interrupt inside one leaves its lock taken for good.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.RLock()
        self._leader: int | None = None  # a thread's identifier
        self._waiting: list[threading.Lock] = []  # a thread waits for each until the lead is given up
        self._asked = False  # whether something was cancelled since the loop looked last

    def until(self, ready: Callable[[], bool]) -> None:
        """Run the loop, or wait while another thread runs it, until ``ready`` says yes.

        Raises:
            SlotError: nothing runs, and all slots are held by others than the loop.
            UsageError: a function that the loop calls, ``cancel`` or a drafter, waits for the loop.
        """
        me = threading.get_ident()
        if self._leader == me:
            raise UsageError(
                "a step of this session is under way in the same thread, and waits for the function that waits for it",
                hint="don't generate in cancel functions, drafters and signal handlers; Handle.cancel is allowed there",
            )
        try:
            while not ready():
                given_up = threading.Lock()
                given_up.acquire()
                with self._lock:
                    if self._leader is None:
                        self._leader = me
                    else:
                        self._waiting.append(given_up)
                if self._leader != me:
                    given_up.acquire()  # until the leader releases it
                    continue
                if not ready() and not self._loop.tick() and not ready():
                    self._loop.slots.check_free()
                self._hand_over()
        finally:
            if self._leader == me:
                self._hand_over()

    def settle(self) -> None:
        """End what was cancelled: now where no thread runs the loop, else before that thread lets it go."""
        me = threading.get_ident()
        self._asked = True
        if self._leader == me:
            return
        try:
            with self._lock:
                if self._leader is not None:
                    return
                self._leader = me
            self._hand_over()
        finally:
            if self._leader == me:
                self._hand_over()

    def _hand_over(self) -> None:
        """Give the lead up, once what was cancelled meanwhile has ended."""
        while True:
            with self._lock:
                while self._waiting:  # safe to begin anew after an interrupt
                    if self._waiting[-1].locked():
                        self._waiting[-1].release()
                    self._waiting.pop()
                if not self._asked:
                    self._leader = None
                    return
                self._asked = False
            self._loop.retire()
