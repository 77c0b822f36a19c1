"""Interrupts and errors between any two lines of the loop: what was under way ends, and the session goes on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from medusa_deploy.runtime import Request
from medusa_deploy.runtime.errors import StepError
from medusa_deploy.runtime.loop.handle import Handle
from support.fake_executor import FakeSession, fake_session
from support.interrupts import Interrupt, interrupt_at

PROMPTS = ([1, 2, 3], [4] * 6, [5, 6])
TOKENS = 3


def in_time(work: Callable[[], Any], where: str) -> Any:
    """What ``work`` returns, done by another thread, which must not hang."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(5)
    assert found, f"another thread hangs or fails after an interrupt at {where}"
    return found[0]


def ask(session: FakeSession, handles: list[Handle]) -> None:
    """Make two requests that others wait for, one of which finds no slot at first, and one of this thread."""
    handles.extend(session.submit(Request(token_ids=prompt, max_new_tokens=TOKENS, rows=3)) for prompt in PROMPTS[:2])
    session.generate(token_ids=PROMPTS[2], max_new_tokens=TOKENS, rows=3)


def outcome(session: FakeSession, handle: Handle, prompt: list[int]) -> bool:
    """Whether the request ended well. It ends well and whole, or with its own error."""
    found = handle.wait()
    chunks = [*handle._chunks, handle._last]
    expected = session.language.greedy(prompt, TOKENS)
    assert found.token_ids == expected[: len(found.token_ids)]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [found.finish_reason]
    if found.finish_reason == "error":
        assert isinstance(found.error, StepError) and tokens == found.token_ids[: len(tokens)]
        return False
    assert tokens == found.token_ids
    assert (found.finish_reason, found.token_ids, found.error) == ("length", expected, None)
    return True


def check(session: FakeSession, handles: list[Handle]) -> int:
    """Everything that was under way ends, and nothing is held afterwards. Returns how many ended well."""
    well = sum(outcome(session, handle, prompt) for handle, prompt in zip(handles, PROMPTS, strict=False))
    assert session.generate(token_ids=[7], max_new_tokens=4).token_ids == session.language.greedy([7], 4)
    assert session.slots.free == session.slots.slots
    assert not session.loop._handles
    return well


def test_an_interrupt_between_any_two_lines_hangs_nobody_and_loses_nothing() -> None:
    """With one slot, the second request waits while the first one runs."""
    with interrupt_at() as lines:
        ask(fake_session(1, prefill_chunk=4), [])
    places = {lines.index(line) + 1 for line in set(lines)} | {len(lines) - lines[::-1].index(line) for line in set(lines)}
    assert len(places) > 200
    ended_well = 0
    for place in sorted(places):
        session, handles = fake_session(1, prefill_chunk=4), list[Handle]()
        with interrupt_at(place) as lines, suppress(Interrupt):
            ask(session, handles)
        ended_well += in_time(partial(check, session, handles), lines[-1])
        assert in_time(partial(session.generate, token_ids=[1], max_new_tokens=2), lines[-1]).error is None
        assert session.slots.free == 1 and not session.loop._handles
    assert ended_well > len(places) / 2, "most interrupts end the request that was running, and not the one that waited"


def test_who_waits_to_be_told_hears_of_the_end_whatever_is_interrupted() -> None:
    def interrupted(place: int, *, cancelled: bool) -> list[str]:
        session, told, asked = fake_session(2), list[bool](), itertools.count()
        request = Request(token_ids=[8, 9], max_new_tokens=TOKENS, rows=3, cancel=lambda: cancelled and next(asked) > 1)
        handle = session.prepare(request, notify=lambda: told.append(handle.done))
        session.loop.submit(handle)
        with interrupt_at(place) as lines, suppress(Interrupt):
            session.generate(token_ids=[1], max_new_tokens=5, rows=1)
        session.generate(token_ids=[1], max_new_tokens=5)
        assert handle.done and told[-1], f"nobody was told of the end after an interrupt at {lines[-1:]}"
        return lines

    for cancelled in (False, True):
        lines = interrupted(0, cancelled=cancelled)
        for line in {line for line in lines if "handle.py" in line or "loop/loop.py" in line}:
            interrupted(lines.index(line) + 1, cancelled=cancelled)


def test_an_interrupt_of_one_thread_leaves_the_others_their_steps() -> None:
    """The main thread is interrupted; others stream meanwhile, and go on."""
    for place in range(1, 400, 11):
        session = fake_session(2, prefill_chunk=4)
        found: list[tuple[list[int], Exception | None]] = []

        def stream(session: FakeSession = session, found: list[Any] = found) -> None:
            for _ in range(4):
                handle = session.submit(Request(token_ids=[8, 9], max_new_tokens=6, rows=3))
                generation = handle.wait()
                found.append((generation.token_ids, generation.error))

        threads = [threading.Thread(target=stream, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        with interrupt_at(place) as lines, suppress(Interrupt):
            session.generate(token_ids=[1, 2, 3], max_new_tokens=TOKENS, rows=3)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), f"a thread hangs after an interrupt at {lines[-1]}"
        expected = session.language.greedy([8, 9], 6)
        assert len(found) == 8
        assert all(tokens == expected or isinstance(error, StepError) for tokens, error in found)
        assert in_time(partial(session.generate, token_ids=[1], max_new_tokens=2), lines[-1]).error is None
        assert session.slots.free == 2
