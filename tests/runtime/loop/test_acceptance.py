"""Acceptance on the host: lossless where it says so, Medusa's rule where it is typical, never a padding row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import NumericsError
from medusa_deploy.runtime.loop.acceptance import Acceptance, accept
from medusa_deploy.runtime.sampling import SamplingParams, scores, weights
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree, chain
from support.trees import prefix_closed, random_tree

VOCAB = 7
PADDING = 3
SETTINGS = [
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(presence_penalty=0.8, frequency_penalty=0.3, logit_bias={0: 1.0, 3: -2.0}),
    SamplingParams(mode="sample", seed=0),
    SamplingParams(mode="sample", temperature=0.6, top_k=5, top_p=0.9, min_p=0.02, seed=0),
    SamplingParams(mode="sample", repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={2: 0.7}, seed=0),
]


class Backbone:
    """Logits that depend on the last two tokens."""

    def __init__(self, seed: int = 0, spread: float = 1.5) -> None:
        self.table = np.random.default_rng(seed).normal(0, spread, (VOCAB, VOCAB, VOCAB)).astype(np.float32)

    def logits(self, context: Sequence[int]) -> np.ndarray:
        return np.asarray(self.table[context[-2], context[-1]])


def drafted(tree: Tree, root: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of a tree's rows: different ones for siblings, token 0 for padding rows."""
    tokens = np.zeros(tree.rows + PADDING, np.int64)
    tokens[0] = root
    candidates = np.array([rng.permutation(VOCAB) for _ in range(max(tree.depth, 1))])
    tokens[1 : tree.rows] = candidates[tree.slots[0], tree.slots[1]]
    return tokens


def verified(backbone: Backbone, tree: Tree, tokens: np.ndarray, history: list[int]) -> np.ndarray:
    """Logits of all rows; padding rows say token 0 with certainty."""
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[tree.rows :, 0] = 1e4
    for row, path in enumerate(tree.row_paths):
        logits[row] = backbone.logits([*history, *tokens[list(path)]])
    return logits


def step(
    backbone: Backbone, tree: Tree, params: SamplingParams, history: list[int], prompt: int, rng: np.random.Generator
) -> Acceptance:
    tokens = drafted(tree, history[-1], rng)
    return accept(params, tree.parents, tokens, verified(backbone, tree, tokens, history), history, prompt)


def generated(backbone: Backbone, params: SamplingParams, prompt: list[int], count: int, trees: Sequence[Tree]) -> list[int]:
    """``count`` tokens, each step with another of ``trees``."""
    rng, history, steps = np.random.default_rng(1), list(prompt), 0
    while len(history) < len(prompt) + count:
        history += step(backbone, trees[steps % len(trees)], params, history, len(prompt), rng).tokens
        steps += 1
    return history[len(prompt) : len(prompt) + count]


@pytest.mark.parametrize("params", SETTINGS, ids=["repetition", "presence", "sample", "filtered", "penalised"])
def test_text_is_the_same_with_any_tree_and_without(params: SamplingParams) -> None:
    rng = np.random.default_rng(2)
    for seed in range(6):
        backbone = Backbone(seed)
        seeded = params if params.seed is None else replace(params, seed=seed)
        plain = generated(backbone, seeded, [1, 2, 3], 60, [ROOT_ONLY])
        for trees in ([chain(4)], [random_tree(rng, top_k=VOCAB) for _ in range(5)], [ROOT_ONLY, chain(1)]):
            assert generated(backbone, seeded, [1, 2, 3], 60, trees) == plain


def test_other_seeds_give_other_text() -> None:
    texts = {tuple(generated(Backbone(), SamplingParams(mode="sample", seed=seed), [1, 2], 20, [chain(3)])) for seed in range(20)}
    assert len(texts) == 20


def exact(backbone: Backbone, params: SamplingParams, context: list[int]) -> np.ndarray:
    weighed = weights(params, scores(params, backbone.logits(context), context, len(context))).astype(np.float64)
    return np.asarray(weighed / weighed.sum())


def expectations(backbone: Backbone, params: SamplingParams) -> np.ndarray:
    """The distribution after each context of two tokens."""
    return np.array([exact(backbone, params, [a, b]) for a in range(VOCAB) for b in range(VOCAB)])


def worst_p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """The smallest chi-square p-value over the contexts (rows), times their number (Bonferroni)."""
    smallest = 1.0
    for seen, probabilities in zip(counts, expected, strict=True):
        if (seen[probabilities == 0] > 0).any():
            return 0.0
        possible = probabilities > 0
        degrees = int(possible.sum()) - 1
        if degrees == 0 or seen.sum() == 0:
            continue
        mean = seen.sum() * probabilities[possible]
        statistic = float(((seen[possible] - mean) ** 2 / mean).sum())
        # Wilson and Hilferty: the cube root of chi-square over its degrees is nearly normal.
        spread = 2 / (9 * degrees)
        smallest = min(smallest, 1 - NormalDist().cdf(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)))
    return smallest * len(counts)


def counted(backbone: Backbone, params: SamplingParams, steps: int) -> tuple[np.ndarray, int]:
    """How often each token followed each context of two, over one step from each of many seeds; and all accepted rows."""
    tree = Tree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    rng = np.random.default_rng(3)
    counts, accepted = np.zeros((VOCAB * VOCAB, VOCAB)), 0
    starts = rng.integers(0, VOCAB, (steps, 2)).tolist()
    # Drafts and logits repeat from a few hundred steps: the draws are what is tested.
    drafts = {}
    for seed, start in enumerate(starts):
        key = (*start, seed % 8)
        if key not in drafts:
            tokens = drafted(tree, start[1], rng)
            drafts[key] = tokens, verified(backbone, tree, tokens, start)
        tokens, logits = drafts[key]
        seeded = replace(params, seed=seed) if params.mode == "sample" else params
        outcome = accept(seeded, tree.parents, tokens, logits, start, 2)
        accepted += len(outcome.path)
        context = list(start)
        for token in outcome.tokens:
            counts[context[-2] * VOCAB + context[-1], token] += 1
            context.append(token)
    return counts, accepted


@pytest.mark.parametrize("steps", [15_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(mode="sample"), SamplingParams(mode="sample", temperature=1.5, top_k=6, top_p=0.95)],
    ids=["all", "filtered"],
)
def test_sampled_tokens_have_the_backbones_distribution(params: SamplingParams, steps: int) -> None:
    backbone = Backbone(9, spread=0.7)
    expected = expectations(backbone, params)
    counts, accepted = counted(backbone, params, steps)
    assert accepted > 0.4 * steps and counts.sum() == steps + accepted
    assert worst_p_value(counts, expected) > 1e-3
    # The test has teeth: a tenth more of each context's most likely token is noticed.
    counts[np.arange(len(counts)), expected.argmax(axis=1)] += 0.1 * counts.sum(axis=1)
    assert worst_p_value(counts, expected) < 1e-3


def test_the_distribution_test_notices_a_lossy_rule() -> None:
    backbone = Backbone(9, spread=0.7)
    counts, _ = counted(backbone, SamplingParams(mode="typical"), 2000)
    assert worst_p_value(counts, expectations(backbone, SamplingParams(mode="sample"))) < 1e-12


def test_penalties_follow_the_rows_own_path() -> None:
    tree = Tree.from_choices([(0,), (1,), (0, 0), (1, 0)])
    tokens = np.array([5, 1, 2, 1, 1])
    logits = np.zeros((5, VOCAB), np.float32)
    logits[0, 1] = 2.0
    logits[1:, [1, 3]] = 2.0, 1.9
    # Row 1 has token 1 on its path, so token 3 is next; the row's sibling would have repeated token 1 freely.
    assert accept(SamplingParams(presence_penalty=0.5), tree.parents, tokens, logits, [0, 5], 1) == Acceptance((1,), [1, 3])
    assert accept(SamplingParams(presence_penalty=0.05), tree.parents, tokens, logits, [0, 5], 1) == Acceptance((1, 3), [1, 1, 1])
    biased = SamplingParams(presence_penalty=0.5, logit_bias={2: 3.0})
    logits[2, 2] = -9.0
    assert accept(biased, tree.parents, tokens, logits, [0, 5], 1) == Acceptance((2, 4), [2, 1, 2])


def test_presence_penalty_spares_the_prompt_and_repetition_penalty_does_not() -> None:
    logits = np.array([[0.0, 1.0, 0.9]], np.float32)
    alone = (ROOT_ONLY.parents, np.array([1]), logits)
    assert accept(SamplingParams(presence_penalty=0.5), *alone, [1, 1], 2).tokens == [1]
    assert accept(SamplingParams(presence_penalty=0.5), *alone, [1, 1], 1).tokens == [2]
    assert accept(SamplingParams(repetition_penalty=1.5), *alone, [1, 1], 2).tokens == [2]


@given(prefix_closed(top_k=VOCAB), st.integers(0, 2**32 - 1), st.sampled_from(["greedy", "sample", "typical"]))
def test_the_path_is_one_of_the_tree_and_tokens_are_its_own_and_one_more(
    choices: list[tuple[int, ...]], seed: int, mode: str
) -> None:
    tree = Tree.from_choices(choices)
    params = SamplingParams(mode=mode, seed=seed)  # type: ignore[arg-type]
    backbone, rng = Backbone(seed), np.random.default_rng(seed)
    tokens = drafted(tree, 1, rng)
    logits = verified(backbone, tree, tokens, [4, 1])
    outcome = accept(params, tree.parents, tokens, logits, [4, 1], 1)
    assert outcome.path == (tree.row_paths[outcome.path[-1]] if outcome.path else ())
    assert outcome.tokens[:-1] == [tokens[row] for row in outcome.path]
    assert 0 <= outcome.tokens[-1] < VOCAB and all(type(token) is int for token in outcome.tokens)


@given(prefix_closed(top_k=VOCAB), st.integers(0, 2**32 - 1))
def test_greedy_accepts_what_the_ancestor_matrix_says(choices: list[tuple[int, ...]], seed: int) -> None:
    tree, backbone = Tree.from_choices(choices), Backbone(seed)
    tokens = drafted(tree, 1, np.random.default_rng(seed))
    logits = verified(backbone, tree, tokens, [4, 1])
    match = tokens[: tree.rows] == logits[tree.parents].argmax(axis=1)
    match[0] = True
    alive = tree.ancestors @ ~match == 0
    last = int(np.flatnonzero(alive)[-1])
    outcome = accept(SamplingParams(), tree.parents, tokens, logits, [4, 1], 1)
    assert outcome.path == tree.row_paths[last]
    assert outcome.tokens[-1] == logits[last].argmax()


def typical_by_reference(params: SamplingParams, tree: Tree, tokens: np.ndarray, logits: np.ndarray) -> Acceptance:
    """The published procedure: all root paths in a padded table, a mask of likely candidates, cumulated products."""
    leaves = [row for row in range(tree.rows) if row not in tree.parents]
    paths = [(0, *tree.row_paths[leaf]) for leaf in leaves]
    best, best_key = paths[0], (-1, -math.inf)
    for path in paths:
        length, likelihood = 0, 0.0
        for parent, child in itertools.pairwise(path):
            shifted = logits[parent].astype(np.float64) / params.temperature
            p = np.exp(shifted - shifted.max()) / np.exp(shifted - shifted.max()).sum()
            entropy = -(p * np.log(p + 1e-5)).sum()
            if p[tokens[child]] <= min(params.typical_epsilon, params.typical_delta * np.exp(-entropy)):
                break
            length, likelihood = length + 1, likelihood + math.log(p[tokens[child]])
        if (length, likelihood) > best_key:
            best, best_key = path, (length, likelihood)
    accepted = best[1 : best_key[0] + 1]
    last = best[best_key[0]]
    return Acceptance(tuple(accepted), [*(int(tokens[row]) for row in accepted), int(logits[last].argmax())])


@given(
    prefix_closed(top_k=VOCAB, depth=3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.02, 0.09, 0.3]),
    st.sampled_from([0.1, 0.3]),
    st.sampled_from([0.7, 1.0, 2.0]),
)
def test_typical_accepts_what_the_published_procedure_accepts(
    choices: list[tuple[int, ...]], seed: int, epsilon: float, delta: float, temperature: float
) -> None:
    params = SamplingParams(mode="typical", typical_epsilon=epsilon, typical_delta=delta, temperature=temperature)
    tree, backbone = Tree.from_choices(choices), Backbone(seed)
    tokens = drafted(tree, 1, np.random.default_rng(seed))
    logits = verified(backbone, tree, tokens, [4, 1])
    assert accept(params, tree.parents, tokens, logits, [4, 1], 1) == typical_by_reference(params, tree, tokens, logits)


def test_typical_takes_the_longer_path_then_the_likelier_one() -> None:
    tree = Tree.from_choices([(0,), (1,), (2,), (1, 0), (2, 0)])
    tokens = np.array([0, 1, 2, 3, 4, 5])
    probabilities = np.full((6, VOCAB), 1e-6)
    probabilities[0, 1:4] = 0.6, 0.2, 0.2
    probabilities[2, 4], probabilities[3, 5] = 0.5, 0.7
    probabilities[2, 6], probabilities[3, 6] = 0.5, 0.3
    probabilities[4:, 0] = 1.0
    outcome = accept(SamplingParams(mode="typical"), tree.parents, tokens, np.log(probabilities), [0, 0], 1)
    assert outcome == Acceptance((3, 5), [3, 5, 0])


@pytest.mark.parametrize("mode", ["greedy", "sample", "typical"])
def test_padding_with_token_0_is_never_accepted(mode: str) -> None:
    tree = Tree.from_choices([(0,), (0, 0)])
    tokens = np.array([4, 0, 2, 0, 0, 0])
    logits = np.full((6, VOCAB), -50.0, np.float32)
    logits[:, 0] = 50.0
    # Token 0 is right everywhere: row 1 carries it, then only padding does.
    outcome = accept(SamplingParams(mode=mode, seed=1), tree.parents, tokens, logits, [4], 1)  # type: ignore[arg-type]
    assert outcome == Acceptance((1,), [0, 0])


@pytest.mark.parametrize("mode", ["greedy", "sample", "typical"])
def test_logits_that_are_not_finite_are_an_error_where_they_are_looked_at(mode: str) -> None:
    params = SamplingParams(mode=mode, seed=1)  # type: ignore[arg-type]
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 2] = 90.0
    arguments = (chain(1).parents, np.array([1, 2, 0]))
    logits[2] = math.nan
    assert accept(params, *arguments, logits, [1], 1).path == (1,)
    logits[1, 0] = math.nan
    if mode != "typical":  # the drafted token is right; the next step meets the NaN behind it, if the answer goes on
        assert accept(params, *arguments, logits, [1], 1) == Acceptance((), [2])
        logits[0, 0] = math.nan
    with pytest.raises(NumericsError):
        accept(params, *arguments, logits, [1], 1)
