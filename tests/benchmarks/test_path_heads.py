"""benchmarks/path_heads.py: what conditioned heads learn, how their paths are ranked, and what a replay counts."""

from __future__ import annotations

import numpy as np
import path_heads
import pytest
import torch
from hypothesis import given, settings, strategies as st
from paths.replay import Recorded, likeliest, path_hits, replay
from paths.training import FrozenHeads, PathHeads, Schedule, train_inputs

from medusa_deploy.calibration.training.examples import Examples
from medusa_deploy.runtime.drafting.draft import TokenPath, ranked_paths
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet

VOCAB, HIDDEN, HEADS = 16, 32, 3
UNSCALED = ((1.0, 0.0),) * HEADS


class Table:
    """Candidates by path, wherever they are asked for."""

    def __init__(self, rows: dict[TokenPath, tuple[list[int], list[float]]]) -> None:
        self._rows = rows

    def candidates(self, position: int, path: TokenPath) -> tuple[list[int], list[float]]:
        return self._rows.get(path, ([], []))

    def behind(self, path: TokenPath) -> tuple[list[int], list[float]]:
        """As the search asks: the numbers are chances."""
        return self.candidates(0, path)


class Same:
    """Candidates that don't depend on the path, as grounded heads have them."""

    def __init__(self, tokens: list[list[int]], chances: list[list[float]]) -> None:
        self._rows = list(zip(tokens, chances, strict=True))

    def behind(self, path: TokenPath) -> tuple[list[int], list[float]]:
        return self._rows[len(path)]


_chances = st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3, unique=True).map(lambda row: sorted(row, reverse=True))


@settings(max_examples=40)
@given(st.lists(_chances, min_size=2, max_size=4), st.integers(1, 12), st.lists(st.integers(0, 5), max_size=2))
def test_without_conditions_paths_are_ranked_as_the_runtime_ranks_them(
    chances: list[list[float]], count: int, repeated: list[int]
) -> None:
    tokens = [list(range(3))] * len(chances)
    continuation = [(token, 0.6 / (place + 1)) for place, token in enumerate(repeated)]
    expected = [path for path, _ in ranked_paths(tokens, chances, continuation, count)]
    assert likeliest(Same(tokens, chances), len(chances), count, continuation) == expected


def test_a_path_goes_on_with_what_follows_its_own_tokens() -> None:
    asked = Table({(): ([1, 2], [0.6, 0.3]), (1,): ([3, 4], [0.2, 0.1]), (2,): ([5], [0.9])})
    assert likeliest(asked, 2, 4, []) == [(1,), (2,), (2, 5), (1, 3)]


@pytest.mark.parametrize(("lookup", "steps"), [(False, 5), (True, 2)])
def test_a_replay_emits_what_was_drafted_and_one_token_more(lookup: bool, steps: int) -> None:
    # Heads propose 8 everywhere; the prompt knows what follows 1.
    nothing = ([99], [-5.0])
    asked = Table({(): ([8], [-0.1]), (8,): nothing, (8, 99): nothing})
    answer = Recorded([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9], 0)
    assert replay(answer, asked, UNSCALED, 5, lookup=lookup) == (6, steps)


def test_rates_count_only_behind_candidates() -> None:
    asked = Table({(): ([1, 2], [-0.5, -1.0]), (1,): ([3, 4], [-0.5, -1.0]), (1, 4): ([5, 6], [-0.5, -1.0])})
    found = path_hits(asked, np.array([[1, 4, 5], [9, 3, 5], [1, 3, -100]]))
    assert found.ranks.tolist() == [[0, 1, 0], [-1, -2, -2], [0, 0, -2]]


def test_a_report_divides_tokens_a_step_by_its_cost() -> None:
    nothing = ([99], [-5.0])
    asked = Table({(): ([8], [-0.1]), (8,): nothing})
    answers = [Recorded([1], [7, 8, 9], 0), Recorded([1], [7, 8, 9], 3)]
    labels = np.array([[8, 9], [9, -100], [-100, -100]] * 2)
    report = path_heads.measure(answers, asked, labels, {"3": 1.5, "heads": 0.1}, [3])
    assert report["heads"]["3"] == {"tokens_per_step": 2.0, "speedup": 1.25}
    assert report["top_1"] == [0.5, 0.0]
    assert report["top_1_of_whole_paths"] == [0.5, 0.0]


def test_heads_see_the_tokens_before_theirs() -> None:
    assert [path_heads.places("pairwise", head) for head in range(4)] == [[], [0], [1], [2]]
    assert [path_heads.places("path", head) for head in range(4)] == [[], [0], [0, 1], [0, 1, 2]]
    assert [path_heads.places("grounded", head) for head in range(4)] == [[]] * 4


@pytest.fixture(scope="module")
def rule() -> tuple[FrozenHeads, Examples, Examples]:
    """The first token is anybody's guess, the second a function of it, the third one of both. Heads know nothing of this."""
    generator = torch.Generator().manual_seed(0)
    embedding, output = (torch.linalg.qr(torch.randn(HIDDEN, VOCAB, generator=generator))[0].T * 4 for _ in range(2))
    tensors: dict[str, np.ndarray] = {"token_map": np.arange(VOCAB)}
    for head in range(HEADS):
        tensors[f"head.{head}.layer.0.weight"] = np.zeros((HIDDEN, 2 * HIDDEN), np.float16)
        tensors[f"head.{head}.layer.0.bias"] = np.ones(HIDDEN, np.float16)
    heads = FrozenHeads(HeadSet(HeadConfig("grounded", HEADS, 1, HIDDEN, VOCAB, "pruned"), tensors), embedding, output)
    parts = []
    for count in (64 * 24, 200):
        roots, first = (torch.randint(0, VOCAB, (count,), generator=generator) for _ in range(2))
        second = (3 * first + 5) % VOCAB
        labels = torch.stack([first, second, (first + second + roots % 2) % VOCAB], 1)
        parts.append(Examples(0.1 * torch.randn(count, HIDDEN, generator=generator).half(), roots, labels))
    return heads, *parts


def test_only_a_head_that_sees_a_token_learns_what_it_tells(rule: tuple[FrozenHeads, Examples, Examples]) -> None:
    heads, examples, unseen = rule
    shortlists, _ = heads.shortlist(examples.hidden, examples.roots, VOCAB)
    weight, loss = train_inputs(heads, 1, [0], examples, shortlists[:, 1], Schedule(epochs=30, learning_rate=3e-2, dropout=0.0))
    blind = PathHeads(heads, [None] * HEADS, unseen, VOCAB, VOCAB)
    seeing = PathHeads(heads, [None, ([0], weight), None], unseen, VOCAB, VOCAB)
    labels = unseen.labels.numpy()
    right = [float((path_hits(one, labels).ranks[:, 1] == 0).mean()) for one in (blind, seeing)]
    assert right[0] < 0.3
    assert right[1] > 0.95
    assert loss < 1.0
    # New inputs at zero change nothing.
    untrained = PathHeads(heads, [None, ([0], np.zeros_like(weight)), None], unseen, VOCAB, VOCAB)
    tokens, log_probs = untrained.candidates(3, (7,))
    expected_tokens, expected = blind.candidates(3, (7,))
    assert tokens == expected_tokens
    np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_no_candidates_behind_a_token_outside_the_draft_vocabulary(rule: tuple[FrozenHeads, Examples, Examples]) -> None:
    heads, _, unseen = rule
    seeing = PathHeads(heads, [None, ([0], np.zeros((HIDDEN, HIDDEN), np.float32)), None], unseen, VOCAB, 4)
    assert seeing.candidates(0, (VOCAB + 3,)) == ([], [])
    assert len(seeing.candidates(0, (3,))[0]) == 4
