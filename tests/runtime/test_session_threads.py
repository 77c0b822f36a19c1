"""Threads that share one session."""

from __future__ import annotations

import threading
import time
from typing import Any

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from support.fake_executor import fake_session

# -- threads -------------------------------------------------------------------------------------------------------


def test_threads_share_a_session() -> None:
    session = fake_session(4)
    expected = {token: session.language.greedy([token, 1], 40) for token in range(1, 5)}
    found: dict[int, list[list[int]]] = {token: [] for token in expected}

    def work(token: int) -> None:
        for repeat in range(3):
            params = SamplingParams(presence_penalty=1e-6) if repeat == 1 else SamplingParams()
            found[token].append(session.generate(token_ids=[token, 1], max_new_tokens=40, params=params).token_ids)

    threads = [threading.Thread(target=work, args=(token,)) for token in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {token: [answer] * 3 for token, answer in expected.items()}
    assert session.slots.free == 4


def test_threads_that_generate_stream_and_list_at_once_lose_nothing() -> None:
    """Six threads on two slots: every answer is what it is alone, and every slot is free in the end."""
    session = fake_session(2, prefill_chunk=4)
    answers = {token: session.language.greedy([token] * 9, 12) for token in range(1, 7)}
    lost: list[tuple[int, list[int]]] = []

    def ask(token: int) -> list[int]:
        options: dict[str, Any] = {"token_ids": [token] * 9, "max_new_tokens": 12}
        match token % 3:
            case 0:
                return session.generate(**options).token_ids
            case 1:
                return [one for chunk in session.stream(**options) for one in chunk.token_ids]
            case _:
                found = dict(session.generate_many([Request(**options)] * 5))
                return [one for index in range(5) for one in found[index].token_ids]

    def work(token: int) -> None:
        for _ in range(4):
            expected = answers[token] * (5 if token % 3 == 2 else 1)
            found = ask(token)
            if found != expected:
                lost.append((token, found))

    threads = [threading.Thread(target=work, args=(token,)) for token in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert session.slots.free == 2


def test_threads_that_wait_share_their_steps() -> None:
    session = fake_session(4)
    start = threading.Barrier(4)

    def work(token: int) -> None:
        start.wait()
        session.generate(token_ids=[token], max_new_tokens=60, speculative=False)

    threads = [threading.Thread(target=work, args=(token,)) for token in range(4)]
    slow = session.executor.run

    def run(plan: StepPlan) -> StepResult:
        time.sleep(0.001)  # as an engine does: the other threads get to submit
        return slow(plan)

    session.executor.run = run  # type: ignore[method-assign]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(len(plan.active) for plan in session.executor.plans) == 4
    assert len(session.executor.plans) < 2 * 60, "four requests of 60 tokens took the steps of one, and few more"
