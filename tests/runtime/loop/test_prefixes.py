"""Prefixes that free slots hold: what is reused, and what is not."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import Request, SamplingParams, load
from medusa_deploy.runtime.drafting.draft import Draft
from medusa_deploy.runtime.errors import NumericsError, StepError, UsageError
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.loop.slots import LEAST, SlotPool
from medusa_deploy.runtime.tree import Shape
from support.fake_executor import FakeSession, fake_session
from support.interrupts import Interrupt, interrupt_at
from support.tiny import VOCAB

SYSTEM = [(7 * place + place // 5) % 120 for place in range(60)]


def cached(session: FakeSession, prompt: list[int], **options: Any) -> int:
    """Answer a prompt; its prompt tokens that were not computed again. The answer must be the right one."""
    found = session.generate(token_ids=prompt, max_new_tokens=4, **options)
    assert found.token_ids == session.language.greedy(prompt, 4)
    assert found.stats.prompt_tokens == len(prompt)
    return found.stats.cached_tokens


def next_turn(session: FakeSession, prompt: list[int]) -> list[int]:
    return [*prompt, *session.language.greedy(prompt, 4), 5, 6, 7]


# -- what is reused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_the_next_turn_of_a_conversation_starts_where_the_last_one_ended(padded: bool) -> None:
    session = fake_session(2, padded=padded)
    assert cached(session, SYSTEM) == 0
    second = next_turn(session, SYSTEM)
    found = cached(session, second)
    assert len(SYSTEM) <= found <= len(SYSTEM) + 3, "rows that were accepted last were not moved into place"
    rows = sum(rows.count for plan in session.executor.plans for rows in plan.active if rows.prefills)
    assert rows <= len(SYSTEM) + len(second) - found
    assert cached(session, next_turn(session, second)) >= len(second)
    stats = session.prefix_stats
    assert (stats.requests, stats.hits) == (3, 2) and stats.cached_tokens > 2 * len(SYSTEM)


def test_two_conversations_keep_a_slot_each_and_a_shared_beginning_is_copied() -> None:
    session = fake_session(2)
    turns = [[*SYSTEM, 1, *range(40)], [*SYSTEM, 2, *range(40)]]
    assert [cached(session, turn) for turn in turns] == [0, len(SYSTEM)]
    for _ in range(3):
        turns = [next_turn(session, turn) for turn in turns]
        assert all(cached(session, turn) >= len(turn) - 7 for turn in turns)


def test_the_last_token_of_a_prompt_is_computed_again() -> None:
    session = fake_session()
    assert [cached(session, SYSTEM) for _ in range(3)] == [0, len(SYSTEM) - 1, len(SYSTEM) - 1]
    hidden = [session.generate(token_ids=SYSTEM, max_new_tokens=4, keep_hidden=True).hidden for _ in range(2)]
    fresh = fake_session().generate(token_ids=SYSTEM, max_new_tokens=4, keep_hidden=True).hidden
    assert fresh is not None
    assert all(np.array_equal(found, fresh, equal_nan=True) for found in hidden if found is not None)


def test_a_short_prefix_is_not_worth_it() -> None:
    session = fake_session()
    short = SYSTEM[: LEAST - 6]
    assert [cached(session, short), cached(session, [*short, 1])] == [0, 0]


def test_a_text_that_nobody_asks_for_gives_way_to_newer_ones() -> None:
    session = fake_session(2, capacity=250)
    stale = [(3 * place + place // 7) % 120 for place in range(200)]
    cached(session, stale)
    turns = [SYSTEM, [99, *SYSTEM]]
    for _ in range(6):
        turns = [next_turn(session, turn) for turn in turns]
        found = [cached(session, turn) for turn in turns]
    assert all(found)


# -- what is not ---------------------------------------------------------------------------------------------------


def test_a_salt_never_sees_the_prefixes_of_another() -> None:
    session = fake_session(3)
    assert [cached(session, SYSTEM, cache_salt=salt) for salt in ("", "a", "b", "a")] == [0, 0, 0, len(SYSTEM) - 1]
    with pytest.raises(UsageError, match="cache_salt"):
        Request(token_ids=[1], cache_salt=5)  # type: ignore[arg-type]


def test_without_the_cache_every_prompt_is_computed() -> None:
    session = fake_session(2)
    session.slots = session.loop.slots = SlotPool(2, 256, keep=False)
    assert [cached(session, SYSTEM) for _ in range(3)] == [0, 0, 0]
    assert session.prefix_stats.hits == 0


def test_a_slot_in_use_is_nobodys_source() -> None:
    session = fake_session(2)
    stream = session.stream(token_ids=SYSTEM, max_new_tokens=50)
    next(stream)
    assert cached(session, SYSTEM) == 0
    assert [token for chunk in stream for token in chunk.token_ids][-1] == session.language.greedy(SYSTEM, 50)[-1]


@pytest.mark.parametrize("call", [2, 5, 6])
def test_a_request_that_failed_leaves_nothing_to_others(call: int) -> None:
    session = fake_session()
    session.executor.fail_at = call
    with pytest.raises(StepError):
        session.generate(token_ids=SYSTEM, max_new_tokens=20, rows=1)
    assert cached(session, SYSTEM) == 0


def test_nan_leaves_nothing_to_others() -> None:
    session = fake_session()
    session.executor.nan = frozenset({VOCAB - 1})
    with pytest.raises(NumericsError):
        session.generate(token_ids=[*SYSTEM, VOCAB - 1])
    session.executor.nan = frozenset()
    assert cached(session, SYSTEM) == 0


def test_a_probe_leaves_nothing_to_others() -> None:
    from medusa_deploy.tools.measure.probe import Probe

    session = fake_session()
    cached(session, SYSTEM)
    with Probe(session) as probe:
        probe.prefill([3] * 50)
    assert cached(session, SYSTEM) == 0


def test_a_copy_that_fails_ends_its_own_request_and_spoils_no_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session(2)
    copy = session.executor.copy
    monkeypatch.setattr(session.executor, "copy", lambda *arguments: copy(*arguments) or 1 / 0)
    long, short = [*SYSTEM, *(place % 120 for place in range(140))], [99] * 40
    assert [cached(session, text) for text in (long, short)] == [0, 0]
    with pytest.raises(StepError, match="division"):
        session.generate(token_ids=[*SYSTEM, 99, 98], max_new_tokens=4)
    assert session.slots.free == 2
    assert [cached(session, text) for text in (short, long)] == [0, len(long) - 1]


class _Deep:
    """Drafts the right tokens behind a wrong one: what is accepted never lies in place."""

    rows, heads = 9, False
    handle: Handle

    def __init__(self, session: FakeSession) -> None:
        self.language = session.language

    def draft(self, candidates: object) -> Draft:
        right = self.language.greedy(self.handle.sequence.tokens, self.rows - 2)
        return Draft(Shape.of((-1, 0, 0, *range(2, self.rows - 1))), np.array([(right[0] + 1) % VOCAB, *right]))


def test_a_text_that_filled_its_slot_is_held_as_far_as_its_rows_are_in_place() -> None:
    for new in range(1, 20):
        session = fake_session(capacity=64)
        session.executor.abilities = replace(session.executor.abilities, deepest=8)
        prompt, drafter = SYSTEM[: 64 - new], _Deep(session)
        drafter.handle = session.submit(Request(token_ids=prompt, max_new_tokens=new, drafting=drafter))
        answer = drafter.handle.result().token_ids
        assert answer == session.language.greedy(prompt, new)
        again = [*prompt, *answer][:63]
        found = session.generate(token_ids=again, max_new_tokens=1)
        assert found.token_ids == session.language.greedy(again, 1) and found.stats.cached_tokens >= LEAST


def test_an_interrupt_between_any_two_lines_of_the_pool_spoils_no_text() -> None:
    texts = [[*SYSTEM[:40], *(place % 120 for place in range(60))], [99] * 40]
    after = [*SYSTEM[:40], 7, 8]

    def interrupted(place: int) -> list[str]:
        session = fake_session(2, padded=True)
        for text in texts:
            cached(session, text)
        with interrupt_at(place) as lines, suppress(Interrupt):
            session.generate(token_ids=after, max_new_tokens=1)
        if place:
            session.generate(token_ids=[5], max_new_tokens=6)
            for text in (*texts, after):
                cached(session, text)
            assert session.slots.free == 2
        return lines

    lines = [line if "slots.py" in line or "loop/loop.py" in line else "" for line in interrupted(0)]
    places = {lines.index(line) + 1 for line in set(lines)} | {len(lines) - lines[::-1].index(line) for line in set(lines)}
    assert len(places) > 100
    for place in places:
        interrupted(place)


# -- real engines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cpu", "standard"])
def test_the_cpu_engine_gives_equal_tokens_with_and_without(tiny_bundle: Path, variant: str) -> None:
    sessions = [load(tiny_bundle, threads=1, slots=3, variant=variant, prefix_cache=on) for on in (False, True)]
    texts = [[*SYSTEM, *range(first, first + 30)] for first in (1, 50)]
    saved = 0
    for _ in range(3):
        for index, text in enumerate(texts):
            for params in (SamplingParams(), SamplingParams(mode="sample", seed=5)):
                options: dict[str, Any] = {"token_ids": text, "max_new_tokens": 12, "params": params, "ignore_eos": True}
                cold, warm = (session.generate(**options) for session in sessions)
                assert cold.token_ids == warm.token_ids and cold.stats.cached_tokens == 0
                saved += warm.stats.cached_tokens
            texts[index] = [*text, *warm.token_ids, 3]
    assert saved > 10 * len(SYSTEM) and sessions[1].prefix_stats.cached_tokens == saved
    assert sessions[0].prefix_stats.hits == 0


def test_a_slot_that_held_nan_takes_a_copy(tiny_bundle: Path) -> None:
    session, fresh = (load(tiny_bundle, threads=1, slots=2) for _ in range(2))
    executor: Any = session.executor
    first = [*SYSTEM, *range(60)]
    session.generate(token_ids=first, max_new_tokens=2, ignore_eos=True)
    source = int(np.flatnonzero(np.abs(executor.caches).sum(axis=(0, 2, 3, 4)))[0])
    other = 1 - source
    weights = executor.caches[:, other]
    handle = session.submit(Request(token_ids=[1, 2, 3], max_new_tokens=20, ignore_eos=True))
    session.loop.tick()
    assert handle.sequence.slot == other
    weights[:] = np.nan
    assert isinstance(handle.wait().error, NumericsError)
    found = session.generate(token_ids=[*SYSTEM, 99, 98], max_new_tokens=8, ignore_eos=True)
    assert found.stats.cached_tokens == len(SYSTEM)
    assert found.token_ids == fresh.generate(token_ids=[*SYSTEM, 99, 98], max_new_tokens=8, ignore_eos=True).token_ids
