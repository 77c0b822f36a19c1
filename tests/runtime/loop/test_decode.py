"""The loop, over an executor whose caches can be read: what comes out never depends on the tree, the batch or the chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings, strategies as st

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.request import AUTOMATIC
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree, chain
from support.fake_executor import fake_session, plain_reference
from support.tiny import HEADS, VOCAB
from support.trees import WIDE, prefix_closed

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
