"""Runs coroutines of tests over a session whose engine calls they hold back and let through."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from support.fake_executor import FakeSession


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop of its own, which must not hang."""
    asyncio.run(asyncio.wait_for(work, 60))


class Gate:
    """Holds each engine call of a session back until it is let through."""

    def __init__(self, session: FakeSession) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        self._run = session.executor.run
        self.entered = threading.Event()
        session.executor.run = self._held  # type: ignore[method-assign]

    def _held(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        while not self._open and not self._permits.acquire(timeout=0.01):
            pass
        return self._run(plan)

    def let(self, steps: int) -> None:
        """Let so many calls through."""
        self._permits.release(steps)

    def open(self) -> None:
        """Let all calls through."""
        self._open = True


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - the session's thread sets no event of the test's
        await asyncio.sleep(0.001)


def nothing_is_left(session: FakeSession) -> bool:
    return session.slots.free == session.slots.slots and not session.loop._handles and not session.loop._submitted
