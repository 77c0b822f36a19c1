"""What an application calls: text in and out, streams, slots, cancellation, threads."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from medusa_deploy.runtime import Chunk, Request, SamplingParams
from medusa_deploy.runtime.drafting.draft import NOTHING, Draft
from medusa_deploy.runtime.errors import (
    PromptError,
    SlotError,
    StepError,
    UsageError,
)
from support.fake_executor import FakeSession, fake_session
from support.text import decode, encode
from support.tiny import EOS


@pytest.fixture
def talking(tmp_path: Path) -> FakeSession:
    pytest.importorskip("tokenizers")
    return fake_session(2, text_folder=tmp_path, eos_token_ids=(EOS,))


def _drain(session: FakeSession, **options: Any) -> tuple[str, list[int], Chunk]:
    """Text and tokens of a whole stream, and its last chunk."""
    chunks = list(session.stream(**options))
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in chunks[:-1])
    return "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids], chunks[-1]


# -- text ----------------------------------------------------------------------------------------------------------


def test_text_and_its_token_ids_are_the_same_prompt(talking: FakeSession) -> None:
    from_text = talking.generate("Once upon", max_new_tokens=20)
    from_ids = talking.generate(token_ids=encode("Once upon"), max_new_tokens=20)
    assert from_text.prompt_token_ids == encode("Once upon")
    assert from_text.token_ids == from_ids.token_ids
    assert from_text.text == from_ids.text == decode(from_text.token_ids)


def test_messages_go_through_the_chat_template(talking: FakeSession) -> None:
    pytest.importorskip("minijinja")
    generation = talking.generate(messages=[{"role": "user", "content": "Hi!"}], max_new_tokens=5)
    assert generation.prompt_token_ids == encode("user:Hi!;>")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    prompt=st.text(alphabet="abcdefgh", min_size=1, max_size=20),
    start=st.integers(0, 30),
    length=st.integers(1, 4),
    include=st.booleans(),
    params=st.sampled_from([SamplingParams(), SamplingParams(mode="sample", seed=4)]),
)
def test_a_stream_adds_up_to_the_generation(
    talking: FakeSession, prompt: str, start: int, length: int, include: bool, params: SamplingParams
) -> None:
    whole = talking.generate(prompt, max_new_tokens=40, params=params)
    stop = whole.text[start : start + length]
    # A fixed number of rows: what pays follows measured times, and then two runs may accept the same tokens in other steps.
    options: dict[str, Any] = {"max_new_tokens": 40, "rows": 5, "params": params}
    options |= {"stop": (stop,) * bool(stop), "include_stop": include}
    generation = talking.generate(prompt, **options)
    text, tokens, last = _drain(talking, prompt=prompt, **options)
    assert (text, tokens, last.finish_reason) == (generation.text, generation.token_ids, generation.finish_reason)
    assert last.stats is not None and last.stats.accepted == generation.stats.accepted
    ((_, listed),) = talking.generate_many([Request(prompt=prompt, **options)])
    assert (listed.text, listed.token_ids, listed.finish_reason) == (text, tokens, last.finish_reason)
    if stop:
        assert generation.finish_reason == "stop"
        assert text == whole.text[: whole.text.index(stop)] + stop * include
        assert tokens == whole.token_ids[: len(tokens)]
    assert talking.slots.free == 2


def test_an_end_of_sequence_token_is_no_text(talking: FakeSession) -> None:
    answer = next(
        generation
        for seed in range(1000)
        if (
            generation := talking.generate("a", max_new_tokens=200, params=SamplingParams(mode="sample", seed=seed))
        ).finish_reason
        == "stop"
    )
    assert answer.token_ids[-1] == EOS
    assert answer.text == decode(answer.token_ids[:-1])


def test_a_wrong_stop_string_takes_no_slot(talking: FakeSession) -> None:
    for stop in (("",), "ab", (5,)):
        with pytest.raises(UsageError, match="stop is"):
            talking.generate("a", stop=stop)
    assert talking.slots.free == 2


# -- slots ---------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_a_slot_and_the_stream_that_holds_it_goes_on() -> None:
    session = fake_session()
    stream = session.stream(token_ids=[1], max_new_tokens=50)
    first = next(stream).token_ids
    assert session.generate(token_ids=[2], max_new_tokens=5).token_ids == session.language.greedy([2], 5)
    assert first + [token for chunk in stream for token in chunk.token_ids] == session.language.greedy([1], 50)
    assert session.slots.free == 1


def test_a_slot_that_somebody_else_holds_for_good_is_an_error_and_not_a_wait() -> None:
    session = fake_session()
    other = SimpleNamespace(slot=-1)
    session.slots.acquire(other)
    with pytest.raises(SlotError, match="all 1 slots") as caught:
        session.generate(token_ids=[2])
    assert "slots" in caught.value.hint
    with pytest.raises(SlotError):
        next(session.generate_many([Request(token_ids=[2])]))
    session.slots.release(other)
    found = session.generate(token_ids=[2], max_new_tokens=5, speculative=False)
    assert found.token_ids == session.language.greedy([2], 5)
    assert session.executor.calls == 5, "the requests that were refused left nothing behind"


def test_a_stream_frees_its_slot_when_it_closes() -> None:
    session = fake_session()
    stream = session.stream(token_ids=[1], max_new_tokens=50)
    next(stream)
    assert session.slots.free == 0
    stream.close()  # type: ignore[attr-defined]
    assert session.slots.free == 1
    assert session.generate(token_ids=[2], max_new_tokens=5).token_ids == session.language.greedy([2], 5)


def test_a_stream_that_is_dropped_frees_its_slot() -> None:
    session = fake_session()
    stream = session.stream(token_ids=[1], max_new_tokens=50)
    next(stream)
    del stream
    gc.collect()
    assert session.slots.free == 1


def test_a_stream_that_never_started_holds_nothing() -> None:
    session = fake_session()
    stream = session.stream(token_ids=[1])
    assert session.slots.free == 1
    del stream


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_failing_engine_frees_the_slot_and_the_next_request_works(call: int) -> None:
    session = fake_session()
    session.executor.fail_at = call
    with pytest.raises(StepError, match="the engine failed"):
        session.generate(token_ids=[1] * 20, max_new_tokens=30)
    assert session.slots.free == 1
    assert session.generate(token_ids=[3] * 20, max_new_tokens=30).token_ids == session.language.greedy([3] * 20, 30)


@pytest.mark.parametrize("call", range(1, 12))
def test_a_failing_engine_call_ends_its_own_requests_alone(call: int) -> None:
    session = fake_session(3)
    session.executor.fail_at = call
    requests = [Request(token_ids=[token] * 10, max_new_tokens=10 + token) for token in range(1, 6)]
    found = dict(session.generate_many(requests))
    failed = {index for index, generation in found.items() if generation.finish_reason == "error"}
    assert failed and len(found) == 5
    for index, generation in found.items():
        expected = session.language.greedy(list(requests[index].token_ids or ()), requests[index].max_new_tokens)
        assert generation.token_ids == expected[: len(generation.token_ids)]
        assert isinstance(generation.error, StepError) if index in failed else len(generation.token_ids) == len(expected)
    assert session.slots.free == 3
    assert sorted(index for index, _ in session.generate_many(requests)) == [0, 1, 2, 3, 4]


def test_an_interrupt_ends_what_was_under_way_and_nothing_else() -> None:
    session = fake_session(2)
    other = session.submit(Request(token_ids=[5], max_new_tokens=5))
    session.executor.error, session.executor.fail_at = KeyboardInterrupt(), 3
    with pytest.raises(KeyboardInterrupt):
        session.generate(token_ids=[1] * 20, max_new_tokens=30)
    assert session.slots.free == 2
    with pytest.raises(StepError, match="interrupted"):
        other.result()
    assert session.generate(token_ids=[3], max_new_tokens=9).token_ids == session.language.greedy([3], 9)


class _Stubborn:
    """A drafter of the caller's own that breaks at its third draft."""

    rows, heads = 1, False

    def __init__(self) -> None:
        self.left = 2

    def draft(self, candidates: object) -> Draft:
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("no more drafts")
        return NOTHING


def test_a_drafter_that_fails_ends_its_own_request_alone() -> None:
    session = fake_session(2)
    requests = [Request(token_ids=[1], drafting=_Stubborn()), Request(token_ids=[2], max_new_tokens=20)]
    found = dict(session.generate_many(requests))
    assert isinstance(found[0].error, ArithmeticError)
    assert found[0].token_ids == session.language.greedy([1], 3)
    assert found[1].token_ids == session.language.greedy([2], 20)


def test_a_cancel_function_that_fails_ends_its_own_request_alone() -> None:
    session = fake_session(2)
    requests = [Request(token_ids=[1], cancel=lambda: 1 / 0 > 1), Request(token_ids=[2], max_new_tokens=20)]
    found = dict(session.generate_many(requests))
    assert isinstance(found[0].error, ZeroDivisionError)
    assert found[1].token_ids == session.language.greedy([2], 20)


def test_leaving_many_early_frees_all_slots() -> None:
    session = fake_session(3)
    requests = [Request(token_ids=[token], max_new_tokens=5 * token) for token in range(1, 6)]
    many = session.generate_many(requests)
    assert next(many)[0] == 0
    assert session.slots.free < 3
    many.close()  # type: ignore[attr-defined]
    assert session.slots.free == 3


def test_a_wrong_request_among_many_ends_alone() -> None:
    session = fake_session(2)
    found = dict(session.generate_many([Request(token_ids=[1]), Request(token_ids=[]), Request(token_ids=[3], max_new_tokens=4)]))
    assert isinstance(found[1].error, PromptError) and found[1].finish_reason == "error"
    assert found[0].token_ids == session.language.greedy([1], 128)
    assert found[2].token_ids == session.language.greedy([3], 4)
    assert session.slots.free == 2


def test_no_requests_are_no_generations() -> None:
    assert list(fake_session().generate_many([])) == []


# -- cancellation --------------------------------------------------------------------------------------------------


def _cancel_after(asked: int) -> Any:
    left = iter([False] * asked)
    return lambda: next(left, True)


def test_cancelling_keeps_what_was_emitted() -> None:
    session = fake_session()
    generation = session.generate(token_ids=[1, 2], max_new_tokens=50, cancel=_cancel_after(4), speculative=False)
    assert generation.finish_reason == "cancelled"
    assert generation.token_ids == session.language.greedy([1, 2], 5)
    assert session.slots.free == 1
    text, tokens, last = _drain(session, token_ids=[1, 2], max_new_tokens=50, cancel=lambda: True)
    assert (text, tokens, last.finish_reason) == ("", session.language.greedy([1, 2], 1), "cancelled")


def test_cancelling_one_of_many_leaves_the_others() -> None:
    session = fake_session(3)
    requests = [
        Request(token_ids=[token], max_new_tokens=20, cancel=_cancel_after(3) if token == 2 else None) for token in range(1, 5)
    ]
    found = dict(session.generate_many(requests))
    assert [found[index].finish_reason for index in range(4)] == ["length", "cancelled", "length", "length"]
    assert len(found[1].token_ids) < 20
    assert found[3].token_ids == session.language.greedy([4], 20)


def test_a_generation_that_is_complete_is_not_cancelled() -> None:
    generation = fake_session().generate(token_ids=[1], max_new_tokens=1, cancel=lambda: True)
    assert generation.finish_reason == "length"
