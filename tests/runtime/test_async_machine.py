"""An asynchronous session at random: submit, read, cancel, fail, step, close. What holds for one request holds among many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from medusa_deploy.runtime import AsyncSession, Generation, Request, SamplingParams
from medusa_deploy.runtime.errors import QueueFullError, SessionClosedError, StepError
from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from support.fake_executor import FakeSession, fake_session
from support.tiny import VOCAB

PARAMS = (SamplingParams(), SamplingParams(mode="sample", seed=3))


@dataclass
class Asked:
    """One request: the task that waits for it, and the answer that it has when it is alone."""

    task: asyncio.Task[Generation]
    expected: list[int]
    how: str
    late: bool = False
    failing: bool = False


class AsyncMachine(RuleBasedStateMachine):
    """Drives an event loop by hand beside the session's own thread, which takes a step only when it is let."""

    session: FakeSession
    served: AsyncSession

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.asked: list[Asked] = []
        self.closing: asyncio.Task[None] | None = None
        self.permits, self.free = threading.Semaphore(0), threading.Event()

    @initialize(slots=st.integers(1, 3), padded=st.booleans(), waiting=st.integers(0, 4))
    def load(self, slots: int, padded: bool, waiting: int) -> None:
        self.session = fake_session(slots, capacity=64, prefill_chunk=8, padded=padded)
        self.alone = fake_session(1, capacity=64, prefill_chunk=8)
        self.served = AsyncSession(self.session, max_waiting=waiting)
        run = self.session.executor.run

        def held(plan: StepPlan) -> StepResult:
            while not self.free.is_set() and not self.permits.acquire(timeout=0.005):
                pass
            return run(plan)

        self.session.executor.run = held  # type: ignore[method-assign]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    @rule(
        length=st.integers(1, 20),
        first=st.integers(0, VOCAB - 1),
        new=st.integers(1, 12),
        params=st.sampled_from(PARAMS),
        priority=st.integers(-1, 1),
        late=st.sampled_from([False] * 5 + [True]),
        how=st.sampled_from(["generate", "stream", "handle"]),
    )
    def submit(self, length: int, first: int, new: int, params: SamplingParams, priority: int, late: bool, how: str) -> None:
        prompt = [(first + 5 * place) % VOCAB for place in range(length)]
        options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": new, "params": params}
        expected = self.alone.generate(**options).token_ids
        options |= {"priority": priority, "deadline": 1e-9 if late else None}
        before = self.served.health()

        async def work() -> Generation:
            if how == "generate":
                return await self.served.generate(**options)
            if how == "handle":
                return await (await self.served.submit(Request(**options))).wait()
            chunks = [chunk async for chunk in self.served.stream(**options)]
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            assert chunks[-1].finish_reason is not None and chunks[-1].stats is not None
            return Generation("", tokens, chunks[-1].finish_reason, prompt, chunks[-1].stats)

        async def begin() -> asyncio.Task[Generation]:
            task = asyncio.create_task(work())
            await asyncio.sleep(0)  # it has its place, or was refused
            return task

        task = self.run(begin())
        error = task.exception() if task.done() else None
        if self.closing is not None:
            assert isinstance(error, SessionClosedError)
        elif isinstance(error, QueueFullError):
            assert before.running + before.waiting == before.slots + self.served.max_waiting
        else:  # a busy machine may have finished it already
            self.asked.append(Asked(task, expected, how, late))

    @rule(steps=st.integers(1, 6))
    def let_steps_through(self, steps: int) -> None:
        self.permits.release(steps)
        self.run(asyncio.sleep(0.002))

    @rule(which=st.integers(0, 99))  # what is drawn must not depend on how many requests a busy machine has refused
    def cancel(self, which: int) -> None:
        if self.asked:
            self.asked[which % len(self.asked)].task.cancel()

    @rule()
    def fail(self) -> None:
        """One of the next calls fails; the session's thread may be in one now."""
        for asked in self.asked:
            asked.failing = asked.failing or not asked.task.done()
        self.session.executor.fail_at = self.session.executor.calls + 1

    @precondition(lambda self: self.closing is None)
    @rule(cancel=st.sampled_from([False, True]), rarely=st.integers(0, 9))
    def close(self, cancel: bool, rarely: int) -> None:
        if rarely:
            return

        async def begin() -> asyncio.Task[None]:
            task = asyncio.create_task(self.served.close(cancel=cancel))
            await asyncio.sleep(0)
            return task

        self.closing = self.run(begin())
        for asked in self.asked:
            asked.late = asked.late or cancel

    @invariant()
    def the_health_adds_up(self) -> None:
        health = self.served.health()
        assert 0 <= health.running <= health.slots and health.closing == (self.closing is not None)
        assert health.running + health.waiting <= health.slots + self.served.max_waiting

    def check_end(self, asked: Asked) -> None:
        if asked.task.cancelled():
            return
        error = asked.task.exception()
        if error is not None:
            closed = isinstance(error, SessionClosedError) and self.closing is not None
            assert closed or (isinstance(error, StepError) and self.failed), repr(error)
            return
        found = asked.task.result()
        assert found.token_ids == asked.expected[: len(found.token_ids)]
        match found.finish_reason:
            case "length":
                assert len(found.token_ids) == len(asked.expected)
            case "cancelled":
                assert asked.late
            case "error":
                assert self.failed
            case reason:
                raise AssertionError(reason)

    @property
    def failed(self) -> bool:
        return self.session.executor.fail_at is not None

    def teardown(self) -> None:
        self.free.set()
        try:
            if not hasattr(self, "session"):
                return

            async def end() -> None:
                await asyncio.wait_for(asyncio.gather(*(one.task for one in self.asked), return_exceptions=True), 20)
                await (self.closing or self.served.close())
                await self.loop.shutdown_asyncgens()
                assert len(asyncio.all_tasks()) == 2, "this one and its parent"

            self.run(end())
            for asked in self.asked:
                self.check_end(asked)
            assert self.session.slots.free == self.session.slots.slots
            assert not self.session.loop._handles and not self.session.loop._submitted
        finally:
            self.loop.close()


TestAsyncSession = AsyncMachine.TestCase
TestAsyncSession.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
