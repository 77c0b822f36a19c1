"""Coroutines share one session: results, streams, cancellation, the bounded queue, closing, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import AsyncSession, Request, SamplingParams, load
from medusa_deploy.runtime.async_handle import AsyncHandle
from medusa_deploy.runtime.errors import CapacityError, QueueFullError, SessionClosedError, SlotError, StepError, UsageError
from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from support.documents import ROOT, blocks
from support.fake_executor import FakeSession, fake_session
from support.text import decode, encode, text_bundle
from support.tiny import VOCAB


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


# -- generating ----------------------------------------------------------------------------------------------------


def test_coroutines_get_what_threads_get() -> None:
    session = fake_session(3)

    async def work() -> None:
        async with AsyncSession(session) as served:
            found = await asyncio.gather(*(served.generate(token_ids=[token], max_new_tokens=9) for token in range(20)))
            assert [one.token_ids for one in found] == [session.language.greedy([token], 9) for token in range(20)]
            chunks = [chunk async for chunk in served.stream(token_ids=[1, 2], max_new_tokens=30)]
            assert [token for chunk in chunks for token in chunk.token_ids] == session.language.greedy([1, 2], 30)
            assert chunks[-1].finish_reason == "length" and chunks[-1].stats is not None
            handle = await served.submit(Request(token_ids=[5], max_new_tokens=8))
            assert (await handle.result()).token_ids == session.language.greedy([5], 8) and handle.done

    run(work())
    assert nothing_is_left(session)


def test_threads_and_event_loops_share_a_session() -> None:
    session = fake_session(2)
    served = AsyncSession(session)
    found: list[bool] = []

    def sync() -> None:
        for token in range(20):
            one = session.generate(token_ids=[token], max_new_tokens=9)
            found.append(one.token_ids == session.language.greedy([token], 9))

    def other_loop() -> None:
        async def work() -> None:
            for token in range(20):
                one = await served.generate(token_ids=[token], max_new_tokens=9)
                found.append(one.token_ids == session.language.greedy([token], 9))

        run(work())

    threads = [threading.Thread(target=target, daemon=True) for target in (sync, sync, other_loop, other_loop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 80
    run(served.close())
    assert nothing_is_left(session)


def test_a_request_that_is_refused_says_so_before_it_is_queued() -> None:
    async def work() -> None:
        async with AsyncSession(fake_session(), max_waiting=0) as served:
            for _ in range(3):
                with pytest.raises(CapacityError):
                    await served.submit(Request(token_ids=[1], max_new_tokens=1000))
            with pytest.raises(UsageError, match="unknown option"):
                await served.generate(token_ids=[1], max_tokens=3)
            await until(lambda: served.health().waiting == 0)
            assert (await served.generate(token_ids=[1], max_new_tokens=2)).finish_reason == "length"

    run(work())


@pytest.mark.parametrize("waiting", [-1, 1.5, "many"])
def test_a_limit_that_is_none_is_refused(waiting: Any) -> None:
    with pytest.raises(UsageError, match="max_waiting"):
        AsyncSession(fake_session(), max_waiting=waiting)


def test_a_failing_step_ends_its_own_requests_and_the_session_goes_on() -> None:
    session = fake_session(2)
    session.executor.fail_at = 3

    async def work() -> None:
        async with AsyncSession(session) as served:
            with pytest.raises(StepError):
                await served.generate(token_ids=[1], max_new_tokens=20)
            handle = await served.submit(Request(token_ids=[2], max_new_tokens=20))
            assert (await handle.wait()).token_ids == session.language.greedy([2], 20)

    run(work())
    assert nothing_is_left(session)


@pytest.mark.parametrize("error", [SystemExit, KeyError])
def test_a_callback_that_raises_ends_what_is_under_way_and_the_session_goes_on(error: type[BaseException]) -> None:
    session = fake_session()

    def cancel() -> bool:
        raise error

    async def work() -> None:
        async with AsyncSession(session) as served:
            failed = await (await served.submit(Request(token_ids=[1], max_new_tokens=20, cancel=cancel))).wait()
            assert failed.finish_reason == "error"
            assert (await served.generate(token_ids=[2], max_new_tokens=5)).finish_reason == "length"

    run(work())
    assert nothing_is_left(session)


def test_a_slot_that_somebody_holds_for_good_is_an_error() -> None:
    from medusa_deploy.tools.measure.probe import Probe

    session = fake_session()

    async def work() -> None:
        async with AsyncSession(session) as served:
            with Probe(session), pytest.raises(SlotError):
                await served.generate(token_ids=[1], max_new_tokens=5)
            assert (await served.generate(token_ids=[1], max_new_tokens=5)).finish_reason == "length"

    run(work())


def test_a_long_prompt_is_encoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    session, go_on = fake_session(), threading.Event()
    encode = session.encode
    monkeypatch.setattr(session, "encode", lambda request: (request.priority != 7 or go_on.wait(10)) and encode(request))

    async def work() -> None:
        async with AsyncSession(session) as served:
            long = asyncio.create_task(served.generate(token_ids=[1] * 99, max_new_tokens=3, priority=7))
            await asyncio.sleep(0)
            assert (await served.generate(token_ids=[2], max_new_tokens=3)).finish_reason == "length"
            assert not long.done() and served.health().waiting == 1
            go_on.set()
            assert (await long).finish_reason == "length"

    run(work())


def test_messages_are_rendered_in_several_threads_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("minijinja")
    session = fake_session(4, text_folder=tmp_path)
    texts = [chr(97 + number) * 20 for number in range(26)]

    async def work() -> None:
        async with AsyncSession(session) as served:
            asked = (served.generate(messages=[{"role": "user", "content": text}], max_new_tokens=6) for text in texts)
            for text, found in zip(texts, await asyncio.gather(*asked), strict=True):
                assert found.prompt_token_ids == encode(f"user:{text};>")
                assert found.token_ids == session.language.greedy(found.prompt_token_ids, 6)
                assert found.text == decode(found.token_ids)

    run(work())


# -- ending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["task", "break", "handle", "dropped", "timeout"])
def test_a_request_that_nobody_reads_any_more_gives_its_slot_back(how: str) -> None:
    session = fake_session()

    async def read(served: AsyncSession, count: int) -> None:
        async with aclosing(served.stream(token_ids=[1], max_new_tokens=200, rows=1)) as chunks:
            async for _ in chunks:
                if not (count := count - 1):
                    return

    async def work() -> None:
        gate = Gate(session)
        async with AsyncSession(session) as served:
            if how in ("handle", "dropped"):
                handle = await served.submit(Request(token_ids=[1], max_new_tokens=200))
                gate.let(3)
                if how == "handle":
                    handle.cancel()
                    gate.open()
                    assert (await handle.wait()).finish_reason == "cancelled"
                del handle
            elif how == "timeout":
                gate.let(3)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(served.generate(token_ids=[1], max_new_tokens=200), 0.05)
            else:
                task = asyncio.create_task(read(served, 2 if how == "break" else 999))
                gate.let(3)
                await until(gate.entered.is_set)
                if how == "task":
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    await task
            gate.open()
            await until(lambda: nothing_is_left(session))
            assert session.executor.calls < 20
            assert (await served.generate(token_ids=[2], max_new_tokens=5)).token_ids == session.language.greedy([2], 5)

    run(work())


def test_a_deadline_counts_from_the_call_and_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session()
    encode = session.encode
    monkeypatch.setattr(session, "encode", lambda request: time.sleep(0.05 * (request.deadline is not None)) or encode(request))

    async def work() -> None:
        gate = Gate(session)
        async with AsyncSession(session) as served:
            first = await served.submit(Request(token_ids=[1], max_new_tokens=9))
            late = await served.submit(Request(token_ids=[2], max_new_tokens=9, deadline=0.04))
            gate.open()
            assert (await late.wait()).finish_reason == "cancelled" and (await late.wait()).token_ids == []
            assert (await first.wait()).finish_reason == "length"

    run(work())


def test_smaller_priority_numbers_are_served_first() -> None:
    session = fake_session()

    async def work() -> None:
        gate = Gate(session)
        async with AsyncSession(session) as served:
            handles = [await served.submit(Request(token_ids=[9, 9], max_new_tokens=2, priority=9))]
            await until(gate.entered.is_set)
            for number in (3, 1, 2):
                handles += [await served.submit(Request(token_ids=[number] * 2, max_new_tokens=2, priority=number))]
            gate.open()
            for handle in handles:
                await handle.result()

    run(work())
    prompts = [rows.tokens[0] for plan in session.executor.plans for rows in plan.active if rows.prefills]
    assert prompts == [9, 1, 2, 3]


# -- the queue and the health --------------------------------------------------------------------------------------


def test_a_full_queue_is_an_error_that_says_when_to_come_back() -> None:
    session = fake_session(2)

    async def work() -> None:
        gate = Gate(session)
        async with AsyncSession(session, max_waiting=1) as served:
            handles = [await served.submit(Request(token_ids=[token], max_new_tokens=5)) for token in range(3)]
            gate.let(1)  # the requests that came during the first step are admitted before the second
            await until(lambda: served.health().running == 2)
            for _ in range(2):
                with pytest.raises(QueueFullError, match="1 requests wait") as caught:
                    await served.submit(Request(token_ids=[4]))
                assert caught.value.waiting == 1 and 0 < caught.value.retry_after < 60 and caught.value.hint
            handles[2].cancel()
            gate.open()
            await until(lambda: handles[2].done and served.health().waiting == 0)
            await served.generate(token_ids=[4], max_new_tokens=3)
            assert [(await handle.wait()).finish_reason for handle in handles] == ["length", "length", "cancelled"]

    run(work())


def test_the_health_is_read_while_the_engine_hangs() -> None:
    session = fake_session()

    async def work() -> None:
        gate = Gate(session)
        async with AsyncSession(session) as served:
            assert served.health().step_age is None
            handle = await served.submit(Request(token_ids=[1], max_new_tokens=9))
            waiting = await served.submit(Request(token_ids=[1], max_new_tokens=1))
            gate.let(2)
            await until(lambda: session.executor.calls == 2)
            await asyncio.sleep(0.06)
            health = served.health()
            assert (health.running, health.waiting, health.slots, health.closing) == (1, 1, 1, False)
            assert health.step_age is not None and health.step_age > 0.05
            gate.open()
            await waiting.wait()
            assert handle.done and (served.health().step_age or 0) < 5

    run(work())


# -- closing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reasons"), [({}, {"length"}), ({"cancel": True}, {"cancelled"}), ({"timeout": 0.05}, {"cancelled"})]
)
def test_closing_lets_requests_end_or_ends_them(options: dict[str, Any], reasons: set[str]) -> None:
    session = fake_session(1)

    async def work() -> None:
        gate, served = Gate(session), AsyncSession(session)
        handles = [await served.submit(Request(token_ids=[token], max_new_tokens=20)) for token in range(3)]
        await until(gate.entered.is_set)
        closing = asyncio.create_task(served.close(**options))
        await until(lambda: served.health().closing)
        with pytest.raises(SessionClosedError):
            await served.generate(token_ids=[1])
        await asyncio.sleep(0.1)
        assert not closing.done()
        gate.open()
        await closing
        assert {(await handle.wait()).finish_reason for handle in handles} == reasons
        await served.close()
        with pytest.raises(SessionClosedError):
            await served.generate(token_ids=[1])
        await until(lambda: not [each for each in threading.enumerate() if each.name.startswith("medusa-deploy")])

    run(work())
    assert nothing_is_left(session)


def test_closing_waits_for_prompts_that_are_being_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    session, go_on = fake_session(), threading.Event()
    encode = session.encode
    monkeypatch.setattr(session, "encode", lambda request: go_on.wait(10) and encode(request))

    async def work(cancel: bool) -> None:
        go_on.clear()
        served = AsyncSession(session)
        task = asyncio.create_task(served.generate(token_ids=[1], max_new_tokens=3))
        await until(lambda: served.health().waiting == 1)
        closing = asyncio.create_task(served.close(cancel=cancel))
        await asyncio.sleep(0.01)
        go_on.set()
        if cancel:
            with pytest.raises(SessionClosedError):
                await task
        else:
            assert (await task).finish_reason == "length"
        await closing

    run(work(cancel=False))
    run(work(cancel=True))
    assert nothing_is_left(session)


def test_an_exception_in_the_block_cancels_what_is_under_way() -> None:
    session = fake_session()

    async def work() -> None:
        async with AsyncSession(session) as served:
            await served.submit(Request(token_ids=[1], max_new_tokens=200))
            raise LookupError

    with pytest.raises(LookupError):
        run(work())
    assert nothing_is_left(session)


def test_an_event_loop_that_ended_cancels_its_requests() -> None:
    session = fake_session()
    served, kept = AsyncSession(session), []

    async def leave() -> None:
        kept.append(await served.submit(Request(token_ids=[1], max_new_tokens=240)))

    run(leave())
    run(served.close())
    assert kept[0].done and nothing_is_left(session)


def test_a_program_that_ends_without_closing_ends(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio\n"
        "from medusa_deploy.runtime import AsyncSession, Request\n"
        "from support.fake_executor import fake_session\n"
        "served = AsyncSession(fake_session(capacity=100000))\n"
        "async def work():\n"
        "    global handle\n"
        "    handle = await served.submit(Request(token_ids=[1], max_new_tokens=900, rows=1))\n"
        "    async for chunk in handle.chunks(): return\n"
        "asyncio.run(work())\n"
    )
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, str(program)], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_runtime_comes_without_asyncio() -> None:
    code = "import sys, medusa_deploy.runtime; sys.exit('medusa_deploy.runtime.async_session' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, timeout=60, check=True)


# -- nothing left --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_requests_of_which_a_third_is_cancelled_leave_nothing_behind() -> None:
    """10,000 requests; memory grows by less than 1 % over the last 8,000."""
    session, chance = fake_session(4), random.Random(1)  # noqa: S311 - nothing secret
    resident: dict[int, int] = {}

    def measure(number: int) -> None:
        gc.collect()
        resident[number] = int(Path("/proc/self/statm").read_text("utf-8").split()[1])

    async def one(served: AsyncSession, number: int) -> None:
        prompt, new = [number % VOCAB, *range(number % 7)], 1 + number % 5
        try:
            if number % 2:
                found = await served.generate(token_ids=prompt, max_new_tokens=new)
                assert found.token_ids == session.language.greedy(prompt, new)
            else:
                params = SamplingParams(mode="sample", seed=number)
                async with aclosing(served.stream(token_ids=prompt, max_new_tokens=new, params=params)) as chunks:
                    assert sum([len(chunk.token_ids) async for chunk in chunks]) == new
        finally:
            session.executor.plans.clear()

    async def work() -> None:
        async with AsyncSession(session, max_waiting=64) as served:
            running: set[asyncio.Task[None]] = set()
            cancelled = 0
            for number in range(10_001):
                task = asyncio.create_task(one(served, number))
                running.add(task)
                if chance.random() < 1 / 3:
                    cancelled += 1
                    delay = chance.choice([0, 1e-4, 1e-3, 3e-3, 1e-2])
                    asyncio.get_running_loop().call_later(delay, task.cancel)
                if len(running) >= 32:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    assert all(one.cancelled() or one.exception() is None for one in done)
                if number % 2000 == 0:
                    await asyncio.gather(*running, return_exceptions=True)
                    running.clear()
                    measure(number)
            assert cancelled > 3000
            assert len(asyncio.all_tasks()) <= 2, "this one and its parent"
            await until(lambda: nothing_is_left(session) and served.health().running + served.health().waiting == 0)

    asyncio.run(work())
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is AsyncHandle]
    assert resident[10_000] < 1.01 * resident[2000], resident


# -- real engines --------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_serves_and_a_client_that_leaves_is_cancelled(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    bundle = text_bundle(tiny_bundle, tmp_path / "bundle")
    (example,) = blocks(ROOT / "docs" / "embedding.md", "python")
    assert len(example.splitlines()) <= 20
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(re.sub(r'load\("[^"]*"', f"load({str(bundle)!r}", example), "embedding.md", "exec"), names)  # noqa: S102
    session = load(bundle, threads=1)
    expected = session.generate("abc\n", max_new_tokens=64).text
    names["load"] = lambda *_, **__: session
    start, servers = asyncio.start_server, []

    async def start_server(*arguments: Any) -> asyncio.Server:
        servers.append(await start(*arguments))
        return servers[0]

    monkeypatch.setattr(asyncio, "start_server", start_server)

    async def work() -> None:
        stop = asyncio.Event()
        server = asyncio.create_task(names["serve"](0, stop))
        await until(lambda: bool(servers))
        reader, writer = await asyncio.open_connection(*servers[0].sockets[0].getsockname())
        writer.write(b"abc\n")
        assert (await reader.readuntil(b"\n")).decode() == expected + "\n"
        writer.write(b"gone\n" * 5)
        await writer.drain()
        writer.transport.abort()
        await until(lambda: session.slots.free == 1)
        stop.set()
        await server

    run(work())
