"""Coroutines share one session: results, streams, refusals, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import AsyncSession, Request, SamplingParams, load
from medusa_deploy.runtime.async_handle import AsyncHandle
from medusa_deploy.runtime.errors import CapacityError, SlotError, StepError, UsageError
from support.coroutines import nothing_is_left, run, until
from support.documents import ROOT, blocks
from support.fake_executor import fake_session
from support.text import decode, encode, text_bundle
from support.tiny import VOCAB

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
    (example,) = (block for block in blocks(ROOT / "docs" / "embedding.md", "python") if "AsyncSession" in block)
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
