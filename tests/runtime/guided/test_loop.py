"""The loop under grammars, over engines and grammars that are functions: drafting changes no token, and all are allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Request, Rows, SamplingParams, Tree
from medusa_deploy.runtime.drafting.draft import Candidates, Draft
from medusa_deploy.runtime.drafting.guide import Guide
from medusa_deploy.runtime.drafting.lookup import PromptLookup
from medusa_deploy.runtime.errors import GrammarError
from medusa_deploy.runtime.request import AUTOMATIC
from medusa_deploy.runtime.sampling import draw, scores, uniform, weights
from support.fake_executor import FakeLanguage, FakeSession, fake_session
from support.grammars import HashedGrammars, HashedMatcher, hashed
from support.tiny import HEADS, VOCAB
from support.trees import WIDE, prefix_closed

EOS = 1
_trees = prefix_closed(depth=HEADS, top_k=4, max_rows=16).map(Tree.from_choices)
_prompts = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=30)
_ways = st.just(AUTOMATIC) | _trees | st.builds(Rows, st.integers(1, 16), st.booleans())
_params = st.just(SamplingParams()) | st.builds(
    SamplingParams,
    mode=st.just("sample"),
    temperature=st.sampled_from([0.3, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.just({}) | st.just({5: 3.0, 9: -3.0}),
    seed=st.integers(0, 5),
)


def guided_session(slots: int = 1, **options: object) -> FakeSession:
    session = fake_session(slots, eos_token_ids=(EOS,), **options)  # type: ignore[arg-type]
    session.grammars = HashedGrammars()  # type: ignore[assignment]
    return session


def reference(language: FakeLanguage, params: SamplingParams, prompt: list[int], count: int, matcher: HashedMatcher) -> list[int]:
    """One token at a time, masked, from the language itself."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < count and not matcher.finished():
        row = scores(params, language.table[language.state(tokens)], tokens, len(prompt))
        row = np.where(matcher.allowed(), row, -np.inf).astype(np.float32)
        if params.mode == "sample":
            assert params.seed is not None
            token = draw(weights(params, row), uniform(params.seed, len(tokens)))
        else:
            token = int(row.argmax())
        tokens.append(token)
        matcher.advance([token])
        if token == EOS:
            break
    return tokens[len(prompt) :]


@given(way=_ways, prompt=_prompts, count=st.integers(1, 40), params=_params, seed=st.integers(0, 5), ends=st.integers(1, 50))
def test_every_way_to_draft_emits_what_plain_decoding_emits(
    way: Rows | Tree, prompt: list[int], count: int, params: SamplingParams, seed: int, ends: int
) -> None:
    session = guided_session()
    got = session.generate(token_ids=prompt, max_new_tokens=count, params=params, drafting=way, grammar=hashed(seed, ends))
    eos = frozenset({EOS})
    assert got.token_ids == reference(session.language, params, prompt, count, HashedMatcher(seed, eos, ends))
    complete = got.token_ids[-1] == EOS or len(got.token_ids) == ends
    assert got.finish_reason == ("stop" if complete else "length")
    assert session.slots.free == 1


@given(way=_ways, seed=st.integers(0, 20))
def test_typical_acceptance_emits_allowed_tokens_alone(way: Rows | Tree, seed: int) -> None:
    session = guided_session()
    params = SamplingParams(mode="typical", temperature=0.7, typical_epsilon=0.0)
    session.generate(token_ids=[3, 4], max_new_tokens=30, params=params, drafting=way, grammar=hashed(seed, 25))  # advance checks


@settings(max_examples=30)
@given(
    asked=st.lists(st.tuples(_prompts, _ways, _params, st.none() | st.integers(0, 5)), min_size=2, max_size=5),
    padded=st.booleans(),
)
def test_requests_with_and_without_grammars_share_steps(
    asked: list[tuple[list[int], Rows | Tree, SamplingParams, int | None]], padded: bool
) -> None:
    session = guided_session(3, padded=padded)
    requests = [
        Request(
            token_ids=prompt,
            max_new_tokens=25,
            params=params,
            drafting=way,
            grammar=None if seed is None else hashed(seed, 20),
        )
        for prompt, way, params, seed in asked
    ]
    together = dict(session.generate_many(requests))
    for index, request in enumerate(requests):
        alone = guided_session().submit(request).result()
        assert together[index].token_ids == alone.token_ids
        assert together[index].finish_reason == alone.finish_reason



@pytest.mark.parametrize("way", [WIDE, Rows(10), Rows(10, lookup=False)], ids=["tree", "rows", "heads"])
def test_refused_candidates_take_no_rows_and_forced_tokens_take_them(way: Rows | Tree) -> None:
    session = guided_session()
    got = session.generate(token_ids=[3, 4, 5], max_new_tokens=40, drafting=way, grammar=hashed(2))
    follow, done, forced_rows = HashedMatcher(2, frozenset({EOS})), 0, 0
    for plan in session.executor.plans:
        (rows,) = plan.active
        if rows.prefills:
            continue
        follow.advance(got.token_ids[done : plan.lengths[0] - 2])  # the root is emitted, and its row isn't committed
        done = plan.lengths[0] - 2
        for row in range(1, rows.count):
            path = [int(rows.tokens[each]) for each in rows.shape.row_paths[row]]
            assert follow.admits(path[:-1], path[-1])
            forced_rows += follow.only(path[:-1]) == path[-1]
        if (first := follow.only()) is not None and rows.count > 1:
            assert list(rows.tokens[rows.shape.parents == 0]) == [first]
    assert forced_rows > 10
    assert got.stats.mean_acceptance_length > 1.8


def test_a_dead_end_ends_the_request_alone_by_name() -> None:
    session = guided_session(2)
    requests = [
        Request(token_ids=[3, 4], max_new_tokens=30, grammar=hashed(1, dead_end=7), drafting=way) for way in (ROOT_ONLY, WIDE)
    ]
    other = Request(token_ids=[3, 4], max_new_tokens=30)
    done = dict(session.generate_many([*requests, other]))
    for index in (0, 1):
        assert done[index].finish_reason == "error" and isinstance(done[index].error, GrammarError)
        assert len(done[index].token_ids) == 7
    assert done[0].token_ids == done[1].token_ids
    assert done[2].finish_reason == "length" and session.slots.free == 2


def test_a_drafter_of_ones_own_is_pruned() -> None:
    class Wrong:
        rows, heads = 4, True

        def draft(self, candidates: Candidates | None) -> Draft:
            assert candidates is not None
            return Draft(WIDE, candidates.tokens[WIDE.slots[0], WIDE.slots[1]])

    Wrong.rows = WIDE.rows
    plain = guided_session().generate(token_ids=[3], max_new_tokens=30, tree=ROOT_ONLY, grammar=hashed(4))
    got = guided_session().generate(token_ids=[3], max_new_tokens=30, drafter=Wrong(), grammar=hashed(4))
    assert got.token_ids == plain.token_ids and got.stats.steps < plain.stats.steps


def test_cancelling_frees_the_slot_and_the_prefix_is_reused() -> None:
    session = guided_session()
    prompt = list(range(3, 60))
    stream = session.stream(token_ids=prompt, max_new_tokens=50, grammar=hashed(3))
    first = next(stream)
    stream.close()
    assert first.token_ids and session.slots.free == 1
    again = session.generate(token_ids=prompt, max_new_tokens=20, grammar=hashed(3))
    fresh = guided_session().generate(token_ids=prompt, max_new_tokens=20, grammar=hashed(3))
    assert again.stats.cached_tokens > 0 and again.token_ids == fresh.token_ids


def test_logprobs_are_the_models_own() -> None:
    session = guided_session()
    got = session.generate(token_ids=[3], max_new_tokens=12, grammar=hashed(6), logprobs=1)
    assert got.logprobs is not None and [each.token_id for each in got.logprobs] == got.token_ids
    assert any(each.top[0][0] != each.token_id for each in got.logprobs)  # the grammar refused the likeliest token


def test_a_hinge_is_proposed_where_the_answer_may_choose_it() -> None:
    """Tokens 5 and 6 may follow each other as they like; 7 forces 8, 9 and 10, behind which all begins anew."""

    class Sevens(HashedMatcher):
        def _mask(self, tokens: Sequence[int]) -> np.ndarray:
            mask = np.zeros(VOCAB, bool)
            last = tokens[-1] if tokens else 5
            mask[[last + 1] if last in (7, 8, 9) else [5, 6, 7]] = True
            return mask

    guide = Guide(Sevens(), 16)
    guide.advance([5, 7, 8, 9, 10, 6, 7, 8, 9, 10, 5])
    paths = dict(guide.ranked_paths([], [], [], 8))
    assert list(paths) == [(7,), (7, 8), (7, 8, 9), (7, 8, 9, 10), *list(paths)[4:]]
    assert 0.2 < paths[7,] < 0.8 and paths[7, 8, 9, 10] == paths[7,]
    assert guide.forced == {(7, 8), (7, 8, 9), (7, 8, 9, 10), *[path for path in guide.forced if len(path) > 4]}


def test_words_match_with_and_without_their_space() -> None:
    lookup = PromptLookup([20, 31, 32, 3, 4, 10], 4, {20: 10})
    assert [token for token, _ in lookup.continuation()] == [31, 32, 3, 4]
    assert PromptLookup([20, 31, 32, 3, 4, 10], 4).continuation() == []
