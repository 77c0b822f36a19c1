"""The loop, over an executor whose caches can be read: what comes out never depends on the tree, the batch or the chunks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.errors import NumericsError, StepError
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.request import AUTOMATIC
from medusa_deploy.runtime.sampling import draw, scores, uniform, weights
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree, chain
from support.fake_executor import FakeLanguage, FakeSession, fake_session
from support.tiny import HEADS, VOCAB
from support.trees import prefix_closed

_trees = prefix_closed(depth=HEADS, top_k=4, max_rows=16).map(Tree.from_choices)
_prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)
_params = st.one_of(
    st.just(SamplingParams()),
    st.builds(
        SamplingParams,
        mode=st.just("sample"),
        temperature=st.sampled_from([0.3, 1.0]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 9),
    ),
    st.just(SamplingParams(frequency_penalty=0.5, presence_penalty=0.2, logit_bias={5: 2.0})),
    st.just(SamplingParams(mode="typical", temperature=0.5)),
)
WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])


def plain_reference(language: FakeLanguage, params: SamplingParams, prompt: list[int], count: int) -> list[int]:
    """One token at a time from the language itself: no engine, no slots, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        row = scores(params, language.table[language.state(tokens)], tokens, len(prompt))
        if params.mode == "sample":
            assert params.seed is not None
            tokens.append(draw(weights(params, row), uniform(params.seed, len(tokens))))
        else:
            tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


@given(tree=_trees, prompt=_prompts, count=st.integers(1, 40), seed=st.integers(0, 3))
def test_speculative_greedy_is_plain_greedy(tree: Tree, prompt: list[int], count: int, seed: int) -> None:
    session = fake_session(seed=seed)
    generation = session.generate(token_ids=prompt, max_new_tokens=count, tree=tree)
    assert generation.token_ids == session.language.greedy(prompt, count)
    assert generation.finish_reason == "length"
    assert session.slots.free == 1


@given(tree=_trees, prompt=_prompts, count=st.integers(1, 30), params=_params.filter(lambda params: params.mode != "typical"))
def test_every_lossless_mode_emits_what_plain_decoding_emits(
    tree: Tree, prompt: list[int], count: int, params: SamplingParams
) -> None:
    session = fake_session()
    generation = session.generate(token_ids=prompt, max_new_tokens=count, tree=tree, params=params)
    assert generation.token_ids == plain_reference(session.language, params, prompt, count)


def test_drafts_are_accepted_in_every_lossless_mode() -> None:
    session = fake_session(tree=WIDE)
    for params in (
        SamplingParams(),
        SamplingParams(mode="sample", temperature=0.3, seed=1),
        SamplingParams(presence_penalty=0.1),
    ):
        stats = session.generate(token_ids=[1, 2, 3], max_new_tokens=60, params=params, tree=WIDE).stats
        assert stats.mean_acceptance_length > 1.5
        assert max(stats.accepted) == HEADS


def test_typical_mode_without_a_tree_is_greedy() -> None:
    session = fake_session()
    generation = session.generate(
        token_ids=[1, 2, 3], max_new_tokens=30, params=SamplingParams(mode="typical"), speculative=False
    )
    assert generation.token_ids == session.language.greedy([1, 2, 3], 30)


_requests = st.builds(
    Request,
    token_ids=_prompts,
    max_new_tokens=st.integers(1, 25),
    params=_params,
    drafting=st.just(AUTOMATIC) | st.just(ROOT_ONLY) | _trees,
    keep_hidden=st.booleans(),
)


@settings(max_examples=30)
@given(
    requests=st.lists(_requests, min_size=1, max_size=7),
    slots=st.integers(2, 4),
    eos=st.sets(st.integers(0, VOCAB - 1), max_size=8),
    padded=st.booleans(),
)
def test_many_at_a_time_are_the_same_as_one_at_a_time(requests: list[Request], slots: int, eos: set[int], padded: bool) -> None:
    together = fake_session(slots, tree=chain(2), eos_token_ids=tuple(eos), padded=padded)
    alone = fake_session(1, tree=chain(2), eos_token_ids=tuple(eos))
    found = dict(together.generate_many(requests))
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        (expected,) = (generation for _, generation in alone.generate_many([request]))
        generation = found[index]
        assert generation.token_ids == expected.token_ids
        assert generation.finish_reason == expected.finish_reason
        assert generation.prompt_token_ids == request.token_ids
        if request.drafting is not AUTOMATIC:  # how many rows are chosen depends on who else decodes
            assert generation.stats.accepted == expected.stats.accepted
        assert (generation.hidden is None) == (not request.keep_hidden)
        if request.keep_hidden:
            assert np.array_equal(generation.hidden[:, 0], expected.hidden[:, 0])  # type: ignore[index]
    assert together.slots.free == slots


@settings(max_examples=25)
@example(turns=[0, 1, 2] * 10, trees=(WIDE, WIDE, WIDE))
@given(turns=st.lists(st.integers(0, 2), max_size=60), trees=st.tuples(_trees, _trees, _trees))
def test_streams_that_take_turns_do_not_disturb_each_other(turns: list[int], trees: tuple[Tree, Tree, Tree]) -> None:
    session = fake_session(3)
    prompts = [[1, 2, 3], [9] * 20, [7, 8]]
    streams = [
        session.stream(token_ids=prompt, max_new_tokens=30, tree=tree) for prompt, tree in zip(prompts, trees, strict=True)
    ]
    found: list[list[int]] = [[], [], []]
    for turn in turns:
        found[turn] += next(streams[turn]).token_ids if len(found[turn]) < 30 else []
    for index, stream in enumerate(streams):
        found[index] += [token for chunk in stream for token in chunk.token_ids]
        assert found[index] == session.language.greedy(prompts[index], 30)


@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60), chunk=st.integers(1, 64))
def test_a_prompt_in_chunks_is_the_same_prompt(prompt: list[int], chunk: int) -> None:
    session = fake_session(prefill_chunk=chunk)
    generation = session.generate(token_ids=prompt, max_new_tokens=12)
    assert generation.token_ids == session.language.greedy(prompt, 12)
    assert session.executor.calls == -(-len(prompt) // chunk) + generation.stats.steps


@given(prompt=_prompts, place=st.integers(0, 29), tree=_trees)
def test_an_end_of_sequence_token_ends_the_answer_wherever_it_is(prompt: list[int], place: int, tree: Tree) -> None:
    answer = fake_session().language.greedy(prompt, 30)
    session = fake_session(eos_token_ids=(answer[place], 1_000))
    generation = session.generate(token_ids=prompt, max_new_tokens=30, tree=tree)
    assert generation.token_ids == answer[: answer.index(answer[place]) + 1]
    assert generation.finish_reason == "stop"
    ignoring = session.generate(token_ids=prompt, max_new_tokens=30, tree=tree, ignore_eos=True)
    assert (ignoring.token_ids, ignoring.finish_reason) == (answer, "length")


def test_an_end_of_sequence_token_inside_an_accepted_path_cuts_it() -> None:
    plain = fake_session(tree=WIDE)
    emitted = [chunk.token_ids for chunk in plain.stream(token_ids=[1, 2, 3], max_new_tokens=60, tree=WIDE)]
    step = next(index for index, tokens in enumerate(emitted) if len(tokens) == HEADS + 1)
    answer, before = [token for tokens in emitted for token in tokens], sum(map(len, emitted[:step]))
    inner = answer[before + 1]
    assert answer.index(inner) == before + 1, "the token must not occur earlier for this test to mean anything"
    session = fake_session(tree=WIDE, eos_token_ids=(inner,))
    generation = session.generate(token_ids=[1, 2, 3], max_new_tokens=60, tree=WIDE)
    assert generation.token_ids == answer[: before + 2]
    assert generation.finish_reason == "stop"


@given(tree=_trees, count=st.integers(1, 50), lookup=st.none() | st.booleans())
def test_statistics_add_up(tree: Tree, count: int, lookup: bool | None) -> None:
    drafting: dict[str, Any] = {"tree": tree} if lookup is None else {"rows": tree.rows, "lookup": lookup}
    stats = fake_session().generate(token_ids=[5, 6], max_new_tokens=count, **drafting).stats
    depth = tree.depth if lookup is None else min(tree.rows - 1, HEADS)
    drafted = sum(accepted * steps for accepted, steps in stats.accepted.items())
    assert stats.prompt_tokens == 2
    assert stats.steps == sum(stats.accepted.values())
    assert stats.rows == stats.steps * tree.rows
    assert stats.emitted == count - 1  # the first token comes from the prefill
    assert 0 <= stats.steps + drafted - stats.emitted <= depth  # what the last step had over
    assert stats.mean_acceptance_length == (1 + drafted / stats.steps if stats.steps else 1)
    assert max(stats.accepted, default=0) <= depth


# -- step by step --------------------------------------------------------------------------------------------------


def _submit(session: FakeSession, prompt: list[int], **options: Any) -> Handle:
    return session.submit(Request(token_ids=prompt, **{"max_new_tokens": 40, "drafting": WIDE, **options}))


def _tick(session: FakeSession, times: int = 1) -> None:
    for _ in range(times):
        assert session.loop.tick()


def test_a_step_emits_one_more_than_it_accepts_and_the_length_follows() -> None:
    session = fake_session()
    sequence = _submit(session, [1, 2, 3]).sequence
    _tick(session)
    assert sequence.emitted == session.language.greedy([1, 2, 3], 1)
    length = int(session.slots.lengths[sequence.slot])
    assert length == 3
    while sequence.finish_reason is None:
        before, count = dict(sequence.stats.accepted), len(sequence.emitted)
        _tick(session)
        (accepted,) = (count for count, steps in sequence.stats.accepted.items() if steps != before.get(count, 0))
        assert 0 <= accepted <= WIDE.depth
        assert session.slots.lengths[sequence.slot] + len(session.slots.moves[sequence.slot]) >= length + 1
        assert len(sequence.emitted) - count == 1 + accepted or sequence.finish_reason == "length"
        length += 1 + accepted
        assert sequence.finish_reason == "length" or session.slots.lengths[sequence.slot] == length
    assert len(sequence.emitted) == 40


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(mode="sample", seed=3)], ids=["in-graph", "host"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_part_of_a_step_that_fails_moves_no_length_and_ends_alone(params: SamplingParams, padded: bool) -> None:
    """The third request's prefill fails beside two that decode: their text is what it is alone."""
    session = fake_session(3, padded=padded)
    one, two = _submit(session, [1, 2, 3], params=params), _submit(session, [4] * 20)
    _tick(session, 6)
    three = _submit(session, [5] * 20)
    _tick(session)
    lengths = session.slots.lengths.copy()
    session.executor.fail_at = session.executor.calls + 2
    _tick(session)
    assert session.slots.lengths[three.sequence.slot] == lengths[three.sequence.slot]
    with pytest.raises(StepError, match="the engine failed") as caught:
        three.result()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert three.wait().finish_reason == "error"
    assert one.result().token_ids == plain_reference(session.language, params, [1, 2, 3], 40)
    assert two.result().token_ids == session.language.greedy([4] * 20, 40)
    assert session.slots.free == 3


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(mode="sample", seed=0)], ids=["in-graph", "host"])
@pytest.mark.parametrize("speculative", [False, True])
def test_a_request_that_sees_nan_ends_alone(params: SamplingParams, speculative: bool) -> None:
    session = fake_session(2)
    drafting = WIDE if speculative else ROOT_ONLY
    expected = plain_reference(session.language, params, [4, 5], 12)
    good = _submit(session, [1, 2, 3], drafting=drafting)
    bad = _submit(session, [4, 5], params=params, drafting=drafting)
    healthy = {1, 2, 3, 4, 5, *session.language.greedy([1, 2, 3], 40)}
    session.executor.nan = frozenset({next(token for token in expected[3:] if token not in healthy)})
    with pytest.raises(NumericsError):
        bad.result()
    failed = bad.wait()
    assert failed.finish_reason == "error" and isinstance(failed.error, NumericsError)
    assert failed.token_ids == expected[: len(failed.token_ids)] and len(failed.token_ids) > 1
    assert good.result().token_ids == session.language.greedy([1, 2, 3], 40)
    assert session.slots.free == 2


def test_a_prompt_that_sees_nan_ends_at_its_chunk() -> None:
    session = fake_session(prefill_chunk=4)
    session.executor.nan = frozenset({7})
    with pytest.raises(NumericsError):
        session.generate(token_ids=[1, 2, 3, 7, 5, 6, 8, 9], max_new_tokens=5)
    assert session.executor.calls == 1


def test_prompts_go_on_a_chunk_at_a_time_between_the_steps_of_others() -> None:
    session = fake_session(3, prefill_chunk=8)
    one = _submit(session, [1, 2, 3], drafting=ROOT_ONLY)
    _tick(session)
    long, other = _submit(session, [4] * 60, max_new_tokens=5), _submit(session, [6] * 30, max_new_tokens=5)
    emitted = []
    while not (long.done and other.done):
        before = len(one.sequence.emitted)
        _tick(session)
        plan = session.executor.plans[-1]
        assert sum(rows.count for rows in plan.active if rows.forced > 1) <= 8
        emitted.append(len(one.sequence.emitted) - before)
        held = [s for s in (long.sequence, other.sequence) if s.state == "prefill"]
        assert all(session.slots.lengths[s.slot] == s.computed for s in held)
    assert emitted[:10] == [1] * 10, "a step of the first request for every chunk"
    assert long.result().token_ids == session.language.greedy([4] * 60, 5)
    assert other.result().token_ids == session.language.greedy([6] * 30, 5)
    assert one.result().token_ids == session.language.greedy([1, 2, 3], 40)


def test_padding_of_slots_that_rest_lies_behind_what_they_keep() -> None:
    """A slot in the middle of its prompt, and one that was released, keep their rows while others step."""
    session = fake_session(3, prefill_chunk=4, padded=True)
    session.generate(token_ids=[9, 9, 9, 8], max_new_tokens=6, tree=WIDE)
    kept = int(session.slots.lengths[0])
    assert kept > 4
    stays = session.slots.acquire(SimpleNamespace(slot=-1))  # nobody steps on the released slot
    session.slots.lengths[stays] = kept
    before = session.executor._tokens[stays, : HEADS + kept].copy()
    one, long = _submit(session, [1, 2, 3]), _submit(session, [4] * 20, max_new_tokens=3)
    assert long.result().token_ids == session.language.greedy([4] * 20, 3)
    assert one.result().token_ids == session.language.greedy([1, 2, 3], 40)
    assert np.array_equal(session.executor._tokens[stays, : HEADS + kept], before)


def test_a_step_holds_the_active_slots_alone() -> None:
    session = fake_session(4)
    session.generate(token_ids=[1, 2], max_new_tokens=10)
    assert all(len(plan.active) == 1 for plan in session.executor.plans)


def test_priorities_are_served_first_and_deadlines_end_requests() -> None:
    session = fake_session(1)
    first = _submit(session, [1], max_new_tokens=5)
    _tick(session)
    late, urgent = _submit(session, [2], max_new_tokens=5, priority=1), _submit(session, [3], max_new_tokens=5)
    too_late = _submit(session, [4], deadline=1e-9)
    assert urgent.result().finish_reason == "length"
    assert first.done and not late.done
    assert late.result().token_ids == session.language.greedy([2], 5)
    assert (too_late.result().finish_reason, too_late.result().token_ids) == ("cancelled", [])


def test_hidden_states_are_those_behind_every_emitted_token() -> None:
    session = fake_session()
    for params in (SamplingParams(), SamplingParams(mode="sample", temperature=0.3, seed=1)):
        for tree in (ROOT_ONLY, WIDE):
            generation = session.generate(token_ids=[1, 2, 3], max_new_tokens=33, keep_hidden=True, tree=tree, params=params)
            assert generation.hidden is not None and generation.hidden.shape == (33, 64)
            context = [1, 2, 3]
            for state, token in zip(generation.hidden[:, 0], generation.token_ids, strict=True):
                assert state == session.language.state(context)
                context.append(token)
