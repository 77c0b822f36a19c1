"""What goes wrong with one request, or in one thread, stays there."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.drafting.draft import NOTHING, Draft
from medusa_deploy.runtime.errors import DraftError, NumericsError, StepError, UsageError
from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from medusa_deploy.runtime.loop.sequence import Sequence
from medusa_deploy.runtime.tree import Shape, chain
from medusa_deploy.tools.measure.probe import Probe
from support.fake_executor import FakeSession, fake_session
from support.tiny import VOCAB


@pytest.fixture
def talking(tmp_path: Path) -> FakeSession:
    pytest.importorskip("tokenizers")
    return fake_session(2, text_folder=tmp_path)


# -- tokenizers ----------------------------------------------------------------------------------------------------


class _Broken:
    """A decoder that fails in one of its calls."""

    def __init__(self, fails: str) -> None:
        self._fails = fails

    def push(self, ids: list[int]) -> str:
        return self._do("push", "ab")

    def flush(self) -> str:
        return self._do("flush", "c")

    def _do(self, name: str, text: str) -> str:
        if self._fails in (name, "both"):
            raise ArithmeticError(f"{name} fails")
        return text


@pytest.mark.parametrize("fails", ["push", "flush", "both"])
def test_a_tokenizer_that_fails_ends_its_own_request_alone(talking: FakeSession, fails: str) -> None:
    good = talking.submit(Request(token_ids=[1, 2], max_new_tokens=9))
    bad = talking.submit(Request(token_ids=[3], max_new_tokens=3))
    bad._output._decoder = _Broken(fails)  # type: ignore[assignment]
    other = talking.submit(Request(token_ids=[5], max_new_tokens=9))
    assert other.result().token_ids == talking.language.greedy([5], 9)
    assert good.result().token_ids == talking.language.greedy([1, 2], 9)
    found = bad.wait()
    assert isinstance(found.error, ArithmeticError) and found.finish_reason == "error"
    assert found.token_ids == talking.language.greedy([3], len(found.token_ids))
    with pytest.raises(ArithmeticError, match="push fails" if fails == "both" else f"{fails} fails"):
        list(bad.chunks())
    assert talking.slots.free == 2


def test_a_stop_string_that_only_the_end_completes_is_why_it_ended(talking: FakeSession) -> None:
    handle = talking.submit(Request(token_ids=[3], max_new_tokens=1, stop=("bc",)))
    handle._output._decoder = _Broken("nothing")  # type: ignore[assignment]
    found = handle.result()
    assert (found.text, found.finish_reason) == ("a", "stop")


# -- drafters and heads --------------------------------------------------------------------------------------------


class _Foreign:
    """A drafter of the caller's own that plays along once, then returns ``draft``."""

    rows, heads = 1, False

    def __init__(self, draft: Any) -> None:
        self._drafts = iter([NOTHING])
        self._last = draft

    def draft(self, candidates: object) -> Draft:
        return next(self._drafts, self._last)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "draft",
    [
        None,
        Draft(chain(2), np.zeros(1, np.int64)),
        Draft(Shape.of((-1, *[0] * 20)), np.zeros(20, np.int64)),
        Draft(Shape.chain(12), np.zeros(11, np.int64)),
        Draft(chain(1), np.array([VOCAB])),
        Draft(chain(1), np.array([-1])),
    ],
    ids=["nothing", "tokens", "rows", "depth", "vocabulary", "negative"],
)
def test_a_draft_that_no_step_can_take_ends_its_own_request_alone(draft: Any, padded: bool) -> None:
    session = fake_session(2, padded=padded)
    good = session.submit(Request(token_ids=[1, 2], max_new_tokens=20))
    with pytest.raises(DraftError) as caught:
        session.generate(token_ids=[3], drafting=_Foreign(draft))
    assert caught.value.hint
    assert good.result().token_ids == session.language.greedy([1, 2], 20)
    assert session.slots.free == 2


def test_what_is_no_drafter_is_refused() -> None:
    with pytest.raises(UsageError, match="drafting is"):
        fake_session().generate(token_ids=[1], drafting="rows")


def test_heads_that_fail_end_the_requests_that_need_them_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session(2)
    good = session.submit(Request(token_ids=[1, 2], max_new_tokens=20))
    monkeypatch.setattr(session.executor, "propose", lambda hidden, root: 1 / 0)
    with pytest.raises(StepError, match="the engine failed: division by zero"):
        session.generate(token_ids=[3], rows=3, params=SamplingParams(mode="sample", seed=1))
    assert good.result().token_ids == session.language.greedy([1, 2], 20)
    assert session.slots.free == 2


# -- waiting and cancelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [{"priority": "high"}, {"priority": 0.5}, {"deadline": "soon"}])
def test_a_request_that_cannot_be_ordered_among_others_is_refused(field: dict[str, Any]) -> None:
    session = fake_session()
    others = [session.submit(Request(token_ids=[token], max_new_tokens=4)) for token in (1, 2)]
    with pytest.raises(UsageError, match=next(iter(field))):
        session.submit(Request(token_ids=[3], **field))
    assert [other.result().finish_reason for other in others] == ["length"] * 2


def test_a_callback_that_generates_is_an_error_and_not_a_deadlock() -> None:
    session = fake_session(2)
    good = session.submit(Request(token_ids=[1, 2], max_new_tokens=20))

    def work() -> None:
        found.append(session.submit(Request(token_ids=[3], cancel=lambda: bool(session.generate(token_ids=[4])))).wait())

    found: list[Any] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it waits for itself"
    assert isinstance(found[0].error, UsageError) and "cancel" in found[0].error.hint
    assert good.result().token_ids == session.language.greedy([1, 2], 20)
    assert session.slots.free == 2


def test_a_callback_may_cancel_any_request() -> None:
    session = fake_session(2)
    other = session.submit(Request(token_ids=[1, 2], max_new_tokens=90))
    asked = itertools.count()
    session.generate(token_ids=[3], max_new_tokens=9, rows=1, cancel=lambda: bool(next(asked) == 3 and other.cancel()))
    assert other.done and other.wait().finish_reason == "cancelled"
    assert session.slots.free == 2


def test_a_request_that_is_cancelled_during_the_last_step_of_another_thread_ends_with_that_step() -> None:
    session = fake_session(2)
    stream = session.stream(token_ids=[1, 2], max_new_tokens=90)
    next(stream)
    run = session.executor.run

    def while_it_runs(plan: StepPlan) -> StepResult:
        closing = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        return run(plan)

    session.executor.run = while_it_runs  # type: ignore[method-assign]
    session.generate(token_ids=[3], max_new_tokens=1)
    assert session.slots.free == 2


def test_a_request_that_is_complete_stays_so_when_its_step_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes while another request's cancel function is asked."""
    session = fake_session(2)
    done = session.submit(Request(token_ids=[1], max_new_tokens=2, rows=1))
    assert session.loop.tick()
    monkeypatch.setattr(type(done), "end", _raises_once(KeyboardInterrupt, type(done).end))
    with pytest.raises(KeyboardInterrupt):
        done.result()
    done.cancel()
    found = done.wait()
    assert found.finish_reason != "cancelled" and (found.error is None) == (found.finish_reason == "length")
    assert session.slots.free == 2


def _raises_once(error: type[BaseException], then: Callable[..., Any]) -> Callable[..., Any]:
    raised = iter([error])

    def call(*arguments: Any) -> Any:
        for each in raised:
            raise each
        return then(*arguments)

    return call


def test_endless_requests_that_are_refused_are_yielded_one_by_one() -> None:
    session = fake_session()

    def endless() -> Iterator[Request]:
        for count in range(100):
            assert count < 50, "it takes requests without an end before it yields"
            yield Request(token_ids=[])

    found = list(itertools.islice(session.generate_many(endless()), 5))
    assert [index for index, _ in found] == list(range(5))
    assert all(generation.finish_reason == "error" for _, generation in found)


# -- beside the loop -----------------------------------------------------------------------------------------------


def test_a_session_generates_beside_a_probe_that_keeps_its_rows() -> None:
    session = fake_session(2, padded=True)
    with Probe(session) as probe:
        before = probe.prefill([1, 2, 3])
        assert session.generate(token_ids=[4], max_new_tokens=9).token_ids == session.language.greedy([4], 9)
        token = int(before.argmax())
        assert probe.root_logits(token).argmax() == session.language.greedy([1, 2, 3], 2)[1]
    assert session.slots.free == 2


def test_shapes_are_equal_to_themselves_and_trees_to_those_of_the_same_paths() -> None:
    assert Shape.of((-1, 0)) != Shape.of((-1, 0, 0)) and Shape.of((-1, 0)) == Shape.of((-1, 0))
    assert chain(2) == chain(2) != chain(3)
    assert len({chain(2), chain(2), chain(3)}) == 2


@pytest.mark.parametrize("padded", [False, True])
def test_requests_leave_nothing_behind(padded: bool) -> None:
    gc.collect()
    others = {id(one) for one in gc.get_objects() if isinstance(one, Sequence)}
    session = fake_session(2, padded=padded)
    requests = (Request(token_ids=[token % VOCAB], max_new_tokens=1 + token % 2) for token in range(3000))
    assert all(found.finish_reason == "length" for _, found in session.generate_many(requests))
    assert not session.loop._handles and not session.loop._submitted and session.slots.free == 2
    gc.collect()
    left = [one for one in gc.get_objects() if isinstance(one, Sequence) and id(one) not in others]
    assert len(left) <= 2, "those of the newest step"


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(frequency_penalty=1e-9)], ids=["graph", "host"])
def test_nan_behind_the_end_of_an_answer_fails_nothing(params: SamplingParams) -> None:
    session = fake_session(capacity=48, prefill_chunk=8)
    prompt = [(33 + 5 * place) % VOCAB for place in range(13)]
    answer = session.language.greedy(prompt, 6)
    session.executor.nan = frozenset({answer[4]})  # drafted and accepted together with the last tokens wanted
    assert answer[4] not in [*prompt, *answer[:4]]
    options: dict[str, Any] = {"token_ids": prompt, "params": params, "rows": 6, "lookup": False}
    assert session.generate(**options, max_new_tokens=4).token_ids == answer[:4]
    assert session.generate(**options, max_new_tokens=5).token_ids == answer[:5]
    with pytest.raises(NumericsError):
        session.generate(**options, max_new_tokens=6)
