"""How requests of coroutines end: cancellation, deadlines, the bounded queue, closing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import AsyncSession, Request
from medusa_deploy.runtime.errors import QueueFullError, SessionClosedError
from support.coroutines import Gate, nothing_is_left, run, until
from support.documents import ROOT
from support.fake_executor import fake_session

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
