"""Steps that run ahead of the host emit what the CPU emits, whoever else decodes, stops or fails beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Request, SamplingParams, Session, load
from medusa_deploy.runtime.errors import NumericsError
from medusa_deploy.runtime.executors.tensorrt import executor as trt
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.tree import Tree, chain
from support.fake_cuda import FakeRuntime
from support.fake_trt import FakeTrt
from support.tiny import HEADS, VOCAB
from support.trees import prefix_closed

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
_trees = prefix_closed(depth=HEADS, top_k=4, max_rows=16).map(Tree.from_choices)
_prompts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=40)
Load = Callable[..., Session]


@pytest.fixture(scope="module")
def sessions(engine_bundle: Path) -> dict[int, Session]:
    """Sessions of 1 and 3 slots on a fake GPU, with small steps of the visible length so that it changes often."""
    from support.fake_engine import load_fake

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "COLUMN_BUCKET", 32)
        return {slots: load_fake(engine_bundle, patch, FakeTrt(FakeRuntime()), slots=slots) for slots in (1, 3)}


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Session:
    """The CPU, one slot, and heads in the engine's precision."""
    return load(tiny_bundle, threads=1, variant="standard")


def _settled(session: Session) -> None:
    """Nobody holds a slot, and the next request finds everything as a first one would."""
    assert session.slots.free == session.slots.slots
    assert not session.slots.lengths.any()
    assert isinstance(session.executor, TrtExecutor) and not session.executor._flying
    ahead = session._decoder._ahead
    assert ahead is not None and not ahead.in_flight


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=_trees, prompt=_prompts, count=st.integers(1, 70), eos=st.booleans())
def test_any_tree_emits_plain_greedy(
    sessions: dict[int, Session], reference: Session, tree: Tree, prompt: list[int], count: int, eos: bool
) -> None:
    options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": count, "ignore_eos": not eos}
    plain = reference.generate(speculative=False, **options)
    found = sessions[1].generate(tree=tree, **options)
    assert (found.token_ids, found.finish_reason) == (plain.token_ids, plain.finish_reason)
    assert found.stats.accepted == reference.generate(tree=tree, **options).stats.accepted
    _settled(sessions[1])


_requests = st.builds(
    Request,
    token_ids=_prompts,
    max_new_tokens=st.integers(1, 30),
    params=st.sampled_from(
        [
            SamplingParams(),
            SamplingParams(),
            SamplingParams(mode="sample", temperature=0.7, seed=3),
            SamplingParams(presence_penalty=0.3),
        ]
    ),
    tree=st.sampled_from([None, ROOT_ONLY, chain(2), WIDE, WIDE]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(_requests, min_size=1, max_size=6))
def test_many_at_a_time_with_sampled_ones_among_them(
    sessions: dict[int, Session], reference: Session, requests: list[Request]
) -> None:
    found = dict(sessions[3].generate_many(requests))
    for index, request in enumerate(requests):
        (expected,) = (generation for _, generation in reference.generate_many([request]))
        assert (found[index].token_ids, found[index].finish_reason) == (expected.token_ids, expected.finish_reason)
    _settled(sessions[3])


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 7])
def test_a_cancelled_stream_leaves_nothing_behind(
    sessions: dict[int, Session], reference: Session, slots: int, after: int
) -> None:
    session, options = sessions[slots], {"token_ids": [4, 5, 6], "max_new_tokens": 40, "ignore_eos": True, "tree": WIDE}
    calls = iter(range(100))
    cancelled = session.generate(cancel=lambda: next(calls) >= after, **options)  # type: ignore[arg-type]
    assert cancelled.finish_reason == "cancelled"
    stream = session.stream(**options)  # type: ignore[arg-type]
    for _ in range(after):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    _settled(session)
    options["token_ids"] = [9] * 20
    assert session.generate(**options).token_ids == reference.generate(**options).token_ids  # type: ignore[arg-type]


def test_streams_that_take_turns_discard_nothing(
    engine_bundle: Path, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.fake_engine import load_fake

    session = load_fake(engine_bundle, monkeypatch, FakeTrt(FakeRuntime()), slots=3)
    launched: list[int] = []
    method = TrtExecutor.launch_next
    monkeypatch.setattr(TrtExecutor, "launch_next", lambda self, end: (launched.append(end), method(self, end))[1])
    prompts = [[4, 5, 6], [9] * 20]
    streams = [session.stream(token_ids=prompt, max_new_tokens=30, tree=WIDE, ignore_eos=True) for prompt in prompts]
    found: list[list[int]] = [[], []]
    for _ in range(5):
        for index in (0, 1):
            found[index] += next(streams[index]).token_ids
    assert launched == [], "one stream's next step is never the next step"
    for index in (0, 1):
        found[index] += [token for chunk in streams[index] for token in chunk.token_ids]
        expected = reference.generate(token_ids=prompts[index], max_new_tokens=30, tree=WIDE, ignore_eos=True)
        assert found[index] == expected.token_ids
    assert launched, "alone, it runs ahead"


@pytest.mark.parametrize("before", range(1, 8))
@pytest.mark.parametrize("failing", ["collect", "launch_next", "results"])
def test_after_an_exception_the_sequence_goes_on_where_it_was(
    sessions: dict[int, Session], reference: Session, monkeypatch: pytest.MonkeyPatch, failing: str, before: int
) -> None:
    """A step in flight is discarded with the one that failed; what it moved stays moved."""
    session = sessions[1]
    decoder = session._decoder
    run = session._open(Request(token_ids=[4, 5, 6], max_new_tokens=60, tree=WIDE, ignore_eos=True))
    sequence = run.sequence
    decoder.prefill(sequence)
    for _ in range(before):
        decoder.step([sequence])
    length, tokens = int(session.slots.lengths[0]), list(sequence.tokens)
    with monkeypatch.context() as patch:
        if failing == "results":
            collect = TrtExecutor.collect

            def broken(self: TrtExecutor) -> Any:
                buffers = collect(self)
                buffers.log_probs[:] = np.nan
                return buffers

            patch.setattr(TrtExecutor, "collect", broken)
        else:
            method, calls = getattr(TrtExecutor, failing), iter(range(9))

            def fail_once(self: TrtExecutor, *arguments: Any) -> Any:
                if next(calls) == 0:
                    raise NumericsError("it failed")
                return method(self, *arguments)

            patch.setattr(TrtExecutor, failing, fail_once)
        with pytest.raises(NumericsError):
            decoder.step([sequence])
    assert (int(session.slots.lengths[0]), sequence.tokens) == (length, tokens)
    while sequence.finish_reason is None:
        decoder.step([sequence])
    decoder.release(sequence)
    assert sequence.emitted == reference.generate(token_ids=[4, 5, 6], max_new_tokens=60, ignore_eos=True).token_ids
    _settled(session)


def test_a_prompt_between_two_steps_does_not_move_another_slots_rows(sessions: dict[int, Session], reference: Session) -> None:
    """The second prompt comes while the first sequence's newest rows still lie outside the cache."""
    session = sessions[3]
    expected = {
        tuple(prompt): reference.generate(token_ids=prompt, max_new_tokens=30, ignore_eos=True).token_ids
        for prompt in ([4, 5, 6], [9] * 33)
    }
    for before in range(1, 8):
        first = session.stream(token_ids=[4, 5, 6], max_new_tokens=30, tree=WIDE, ignore_eos=True)
        found = [token for _ in range(before) for token in next(first).token_ids]
        second = session.generate(token_ids=[9] * 33, max_new_tokens=30, tree=WIDE, ignore_eos=True)
        found += [token for chunk in first for token in chunk.token_ids]
        assert found == expected[4, 5, 6]
        assert second.token_ids == expected[tuple([9] * 33)]


def test_what_a_step_emits_is_what_the_graph_says_that_it_emits(on_gpu: Load, gpu: FakeTrt) -> None:
    """``emitted`` leaves the device beside the rows that the host reads it from."""
    from medusa_deploy.runtime.executors import step_io

    session = on_gpu()
    executor = session.executor
    assert isinstance(executor, TrtExecutor)
    stream = session.stream(token_ids=[4, 5, 6], max_new_tokens=60, tree=WIDE, ignore_eos=True)
    checked = 0
    for index, chunk in enumerate(stream):
        if index < 3 or chunk.finish_reason or not executor._flying:
            continue
        slot = executor._ring[(executor._launched - 1) % trt.RING]
        layout = executor._host.step_layout(slot.rows)
        emitted = layout.moving.views(slot.memory.bytes)[step_io.EMITTED][0]
        assert [int(token) for token in emitted if token >= 0] == chunk.token_ids
        checked += len(chunk.token_ids) > 1
    assert checked > 2
