"""What a step verifies: a fixed tree, or the rows that promise most by the heads and by what the text repeats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.drafting.draft import UNKNOWN_SCALING, BestRows, Candidates, Draft, FixedTree, Scale, ranked_paths
from medusa_deploy.runtime.drafting.lookup import DEEPEST, PromptLookup
from medusa_deploy.runtime.errors import CapacityError, UsageError
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree
from support.fake_executor import fake_session

LOOP = [1, 2, 3, 4, 5, 1, 2, 3, 4]
"""A match of four tokens; 5, 1, 2, 3 follow."""


def candidates(*probabilities: list[float]) -> Candidates:
    """Head k proposes the tokens 100 + 10 k, 101 + 10 k …"""
    chances = np.array(probabilities, np.float32)
    return Candidates(100 + 10 * np.arange(len(chances))[:, None] + np.arange(chances.shape[1]), np.log(chances))


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    """Paths of tokens, row by row, the root left out."""
    return [tuple(draft.tokens[row - 1].item() for row in path) for path in draft.shape.row_paths[1:]]


def test_a_fixed_tree_is_filled_with_candidates() -> None:
    tree = Tree.from_choices([(0,), (1,), (0, 2)])
    draft = FixedTree(tree).draft(candidates([0.5, 0.3, 0.1], [0.4, 0.3, 0.1]))
    assert draft.shape is tree
    assert draft.tokens.tolist() == [100, 101, 112]


def test_a_root_alone_needs_no_candidates() -> None:
    for drafter in (FixedTree(ROOT_ONLY), BestRows(1, ())):
        draft = drafter.draft(None)
        assert (draft.shape.rows, draft.tokens.tolist()) == (1, [])


def test_rows_go_deep_where_heads_are_sure_and_wide_where_they_are_not() -> None:
    scaling = ((1.0, 0.0),) * 3
    sure = candidates([0.9, 0.05], [0.9, 0.05], [0.9, 0.05])
    unsure = candidates([0.4, 0.35], [0.3, 0.2], [0.3, 0.2])
    assert paths_of(BestRows(4, scaling).draft(sure)) == [(100,), (100, 110), (100, 110, 120)]
    assert paths_of(BestRows(4, scaling).draft(unsure)) == [(100,), (101,), (100, 110)]


def test_scaling_says_how_far_to_trust_a_head() -> None:
    heads = candidates([0.6, 0.2], [0.9, 0.01])
    assert paths_of(BestRows(3, ((1.0, 0.0), (1.0, 0.0))).draft(heads)) == [(100,), (100, 110)]
    assert paths_of(BestRows(3, ((1.0, 0.0), (1.0, -4.0))).draft(heads)) == [(100,), (101,)]


def test_heads_that_nobody_measured_are_trusted_a_little_less_than_they_ask() -> None:
    heads = candidates([0.6, 0.2], [0.9, 0.01])
    assert paths_of(BestRows(3, ()).draft(heads)) == paths_of(BestRows(3, UNKNOWN_SCALING * 2).draft(heads))


def test_a_long_match_takes_the_rows_that_promise_less() -> None:
    heads = candidates(*[[0.9, 0.01]] * 4)
    draft = BestRows(5, ((1.0, 0.0),) * 4, PromptLookup(LOOP * 2)).draft(heads)
    assert draft.looked_up
    assert paths_of(draft) == [(1,), (100,), (1, 2), (1, 2, 3)]


def test_a_long_match_goes_on_behind_the_last_head() -> None:
    draft = BestRows(9, ((1.0, 0.0),), PromptLookup([1, 2, 3, 4, 5] * 3)).draft(candidates([0.6, 0.01]))
    assert max(paths_of(draft), key=len) == (1, 2, 3, 4, 5, 1, 2, 3)
    shallow = BestRows(9, ((1.0, 0.0),), PromptLookup([1, 2, 3, 4, 5] * 3, deepest=2)).draft(candidates([0.6, 0.01]))
    assert max(paths_of(shallow), key=len) == (1, 2)


def test_a_weak_match_leaves_the_better_rows() -> None:
    heads = candidates([0.6, 0.3], [0.6, 0.3])
    drafter = BestRows(4, ((1.0, 0.0),) * 2, PromptLookup([4, 9, 8, 4]))
    assert paths_of(drafter.draft(heads)) == [(100,), (101,), (100, 110)]


def test_a_token_proposed_by_both_is_one_row() -> None:
    heads = candidates([0.5, 0.4, 0.01])
    drafter = BestRows(3, ((1.0, 0.0),), PromptLookup([101, 7, 101, 3, 7]))
    assert paths_of(drafter.draft(heads)) == [(101,), (100,)]
    certain = BestRows(2, ((1.0, 0.0),), PromptLookup([6, 7, 101, 3, 6, 7]))
    assert paths_of(certain.draft(heads)) == [(101,)]


def test_no_more_rows_than_there_are_paths() -> None:
    draft = BestRows(9, ()).draft(candidates([0.5, 0.2]))
    assert paths_of(draft) == [(100,), (101,)]


def test_heads_that_return_nan_still_draft_a_tree() -> None:
    """The next engine call names the fault; drafting mustn't fall over it first."""
    heads = candidates(*[[0.9, 0.01]] * 4)
    heads.log_probs[1:] = np.nan
    paths = paths_of(BestRows(5, (), PromptLookup(LOOP)).draft(heads))
    assert all(path[:-1] in {(), *paths} for path in paths)


_log_prob = st.floats(-200, 0, width=32) | st.floats(-(2**-10), 0, width=32) | st.just(-np.inf)
_log_probs = st.lists(_log_prob, min_size=4, max_size=4)


@given(st.lists(_log_probs, min_size=1, max_size=3), st.data())
def test_chances_are_what_the_scaling_makes_of_the_odds(log_probs: list[list[float]], data: st.DataObject) -> None:
    pair = st.tuples(st.floats(0, 3), st.floats(-3, 3)) | st.sampled_from([(1e300, 0.0), (0.0, 1e4), (0.0, -1e4)])
    scaling = tuple(data.draw(pair) for _ in log_probs)
    said = np.array([sorted(row, reverse=True) for row in log_probs], np.float32)
    slopes, offsets = np.array(scaling).T[:, :, None]
    with np.errstate(all="ignore"):
        against = np.clip(np.expm1(-said.astype(np.float64)), 1e-6, 1e6)
        expected = 1 / (1 + np.exp(slopes * np.log(against) - offsets))
    found = Scale(scaling).chances(said)
    assert np.array(found) == pytest.approx(expected, rel=1e-6, abs=1e-300)
    assert found == [sorted(row, reverse=True) for row in found]


_ties = st.lists(st.sampled_from([1.0, 0.5, 0.25, 0.0]), min_size=3, max_size=3).map(lambda row: sorted(row, reverse=True))


@given(st.lists(_ties, min_size=1, max_size=3), st.integers(0, 39))
def test_paths_of_the_heads_alone_are_the_likeliest_shorter_ones_first(chances: list[list[float]], count: int) -> None:
    tokens = [[100 + 10 * head + rank for rank in range(3)] for head in range(len(chances))]
    ranked = ranked_paths(tokens, chances, [], count)
    order = [(-chance, len(path)) for path, chance in ranked]
    depths = range(1, len(chances) + 1)
    values = [(-np.prod(of), len(of)) for depth in depths for of in itertools.product(*chances[:depth])]
    assert order == sorted(values)[:count]
    assert len({path for path, _ in ranked}) == len(ranked)


_chances = st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3).map(lambda row: sorted(row, reverse=True))


_texts = st.lists(st.integers(100, 124), min_size=1, max_size=20)


@given(st.lists(_chances, min_size=1, max_size=3), st.integers(1, 9), _texts, st.data())
def test_rows_are_the_best_paths_of_both(chances: list[list[float]], rows: int, text: list[int], data: st.DataObject) -> None:
    """Breadth order, parents drafted, and no other choice of as many rows promises more."""
    number = st.floats(-2, 2, width=16)
    scaling = tuple((abs(data.draw(number)), data.draw(number)) for _ in chances)
    heads = candidates(*chances)
    paths = paths_of(BestRows(rows, scaling, PromptLookup(text)).draft(heads))
    assert len(paths) == len(set(paths))
    assert paths == sorted(paths, key=len)
    assert all(path[:-1] in {(), *paths} for path in paths)
    promised: dict[tuple[int, ...], float] = {}
    for depth in range(1, len(chances) + 1):
        for ranks in itertools.product(range(3), repeat=depth):
            value = 1.0
            for head, rank in enumerate(ranks):
                p = float(np.exp(heads.log_probs[head, rank].astype(float)))
                slope, offset = scaling[head]
                value /= 1 + np.exp(-(slope * np.log(p / (1 - p)) + offset))
            promised[tuple(heads.tokens[head, rank].item() for head, rank in enumerate(ranks))] = value
    so_far: tuple[int, ...] = ()
    for token, rate in PromptLookup(text).continuation(DEEPEST):
        so_far = (*so_far, token)
        promised[so_far] = 1 - (1 - promised.get(so_far, 0)) * (1 - rate)
    best = sorted(promised.values(), reverse=True)[: rows - 1]
    assert sorted((promised[path] for path in paths), reverse=True) == pytest.approx(best, rel=1e-6)


def test_repetition_is_accepted_where_heads_know_nothing() -> None:
    session = fake_session(tree=Tree.from_choices([(0,), (1,), (2,)]))
    prompt = [3, 1, 4, 1, 5] * 3
    runs = [
        session.generate(token_ids=prompt, max_new_tokens=40, **options)
        for options in ({"speculative": False}, {"rows": 4}, {"rows": 4, "lookup": False}, {"rows": 9}, {"tree": session.tree})
    ]
    assert len({tuple(run.token_ids) for run in runs}) == 1
    _, default, heads, wide, fixed = (run.stats for run in runs)
    assert 0 < default.lookup_steps <= default.steps
    assert heads.lookup_steps == fixed.lookup_steps == 0
    assert default.rows == 4 * default.steps
    assert wide.rows == 9 * wide.steps
    assert max(fixed.accepted) == 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rows": 4, "tree": ROOT_ONLY}, UsageError, "a tree and 4 rows"),
        ({"rows": 0}, UsageError, "rows is 0"),
        ({"rows": 1.5}, UsageError, "rows is 1.5"),
        ({"rows": 17}, CapacityError, "17 rows, the bundle allows 16"),
    ],
)
def test_rows_that_a_step_cannot_have_are_refused(options: dict[str, object], error: type[Exception], said: str) -> None:
    session = fake_session()
    with pytest.raises(error, match=said):
        session.generate(token_ids=[1, 2], **options)  # type: ignore[arg-type]
    assert session.slots.free == 1
