"""Tests sampling parameters, and the arithmetic on one row of logits against plain restatements of the definitions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import NumericsError, SamplingError
from medusa_deploy.runtime.sampling import SamplingParams, draw, scores, uniform, weights

VOCAB = 50


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "beam"},
        {"mode": "sample", "temperature": 0},
        {"mode": "typical", "temperature": 0.0},
        {"mode": "sample", "temperature": -1.0},
        {"mode": "sample", "temperature": math.nan},
        {"mode": "sample", "temperature": "1"},
        {"mode": "sample", "top_k": -1},
        {"mode": "sample", "top_k": 2.5},
        {"mode": "sample", "top_k": True},
        {"mode": "sample", "top_p": 0.0},
        {"mode": "sample", "top_p": 1.1},
        {"mode": "sample", "min_p": 1.5},
        {"mode": "sample", "seed": -1},
        {"mode": "sample", "seed": 1 << 64},
        {"mode": "sample", "seed": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"logit_bias": {VOCAB: 1.0}},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: None}},
        {"mode": "typical", "typical_epsilon": -0.1},
        {"mode": "typical", "typical_delta": 2.0},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(options: dict[str, object]) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**options).validate(VOCAB)  # type: ignore[arg-type]
    name = next(name for name in reversed(options))
    assert name in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"mode": "sample", "typical_epsilon": 0.2}],
    ids=str,
)
def test_a_value_that_the_mode_would_ignore_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(SamplingError, match="does not use it"):
        SamplingParams(**options).validate(VOCAB)  # type: ignore[arg-type]


def test_temperature_zero_points_to_greedy() -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(mode="sample", temperature=0).validate(VOCAB)
    assert "greedy" in caught.value.hint
    SamplingParams(mode="greedy", temperature=0).validate(VOCAB)


def test_plain_argmax_needs_greedy_mode_without_bias_and_penalties() -> None:
    assert SamplingParams().plain_argmax
    changed = [{"mode": "sample"}, {"logit_bias": {1: 0.5}}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}]
    assert not any(SamplingParams(**options).plain_argmax for options in changed)  # type: ignore[arg-type]


def test_resolving_fixes_a_seed_once() -> None:
    params = SamplingParams(mode="sample", top_k=3)
    first = params.resolved()
    assert first.seed is not None and first.top_k == 3 and first.resolved() is first
    assert len({params.resolved().seed for _ in range(8)}) > 1
    assert SamplingParams(mode="sample", seed=0).resolved().seed == 0
    first.validate(VOCAB)


def test_the_uniform_number_depends_on_seed_and_position_alone() -> None:
    assert uniform(3, 7) == uniform(3, 7)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500
    assert uniform(2**64 - 1, 2**40) < 1


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(11, position) for position in range(20_000)], [uniform(seed, 11) for seed in range(20_000)]):
        counts = np.bincount((np.array(numbers) * 20).astype(int), minlength=20)
        assert len(counts) == 20
        assert ((counts - 1000) ** 2 / 1000).sum() < 52.4  # chi-square, 19 degrees of freedom, p = 6e-5
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300).filter(any), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulated_weights_in_id_order(whole: list[int], number: float) -> None:
    target, below = number * sum(whole), 0
    expected = -1
    while below <= target:
        expected += 1
        below += whole[expected]
    assert draw(np.array(whole, np.float32), number) == expected


def test_draw_never_takes_a_token_without_weight() -> None:
    weighed = np.zeros(200, np.float32)
    weighed[[70, 130]] = 0.1
    assert {draw(weighed, number) for number in (0.0, 0.5, 1 - 2**-53)} == {70, 130}
    assert draw(weighed, 0.0) == 70 and draw(weighed, 1 - 2**-53) == 130


def kept_by_definition(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Returns token to probability: applies temperature, top-k, top-p and min-p in turn to sorted Python lists."""
    values = {token: math.exp((float(logit) - float(logits.max())) / params.temperature) for token, logit in enumerate(logits)}
    ranked = sorted(values, key=lambda token: -values[token])
    ranked = ranked[: params.top_k or None]
    total, mass, nucleus = sum(values[token] for token in ranked), 0.0, []
    for token in ranked:
        if mass < params.top_p * total:
            nucleus.append(token)
        mass += values[token]
    likely = [token for token in nucleus if values[token] >= params.min_p * values[ranked[0]]]
    total = sum(values[token] for token in likely)
    return {token: values[token] / total for token in likely}


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([3, 64, 65, 500]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 100, 1000]),
    top_p=st.sampled_from([1.0, 0.93, 0.51, 1e-3]),
    min_p=st.sampled_from([0.0, 0.0712, 1.0]),
)
def test_weights_are_the_filtered_distribution(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = (np.random.default_rng(seed).permutation(size) * (8.0 / size)).astype(np.float32)
    params = SamplingParams(mode="sample", temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = weights(params, logits)
    expected = np.zeros(size)
    for token, probability in kept_by_definition(logits, params).items():
        expected[token] = probability
    # A token right at the edge of the nucleus may fall to either side by rounding.
    assert np.count_nonzero((got > 0) != (expected > 0)) <= (1 if top_p < 1 else 0)
    if np.array_equal(got > 0, expected > 0):
        np.testing.assert_allclose(got / got.sum(dtype=np.float64), expected, rtol=1e-5)


def test_filters_keep_ties_of_the_last_token_kept() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    for options in ({"top_k": 2}, {"top_p": 0.7}):
        kept = weights(SamplingParams(mode="sample", **options), logits) > 0
        assert kept.tolist() == [False, True, True, True, False]


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8),
    context=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    prompt_length=st.integers(0, 12),
    bias=st.dictionaries(st.integers(0, 7), st.floats(-5, 5), max_size=3),
)
def test_scores_follow_the_definitions_of_the_penalties(
    logits: list[float], context: list[int], prompt_length: int, bias: dict[int, float]
) -> None:
    prompt_length = min(prompt_length, len(context))
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.25, logit_bias=bias)
    emitted = Counter(context[prompt_length:])
    expected = []
    for token, logit in enumerate(logits):
        value = logit + bias.get(token, 0.0)
        if token in context:
            value = value * 1.3 if value < 0 else value / 1.3
        if token in emitted:
            value -= 0.5 - 0.25 * emitted[token]
        expected.append(value)
    given_logits = np.array(logits, np.float32)
    got = scores(params, given_logits, context, prompt_length)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == np.float32 and given_logits.tolist() == logits


def test_half_precision_logits_are_scored_in_single_precision() -> None:
    logits = np.array([1.5, -2.25, 60000.0], np.float16)
    for params in (SamplingParams(mode="sample"), SamplingParams(logit_bias={0: 1e4})):
        assert scores(params, logits, [0], 1).dtype == np.float32
    assert scores(SamplingParams(logit_bias={2: 1e4}), logits, [0], 1)[2] == 70000.0  # above half precision's range


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.array([0.0, bad, bad, 1.0], np.float32)
    with pytest.raises(NumericsError, match="2 of 4"):
        scores(SamplingParams(mode="sample"), logits, [0], 1)


def test_the_same_tokens_survive_as_in_transformers() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    rng = np.random.default_rng(5)
    for _ in range(20):
        logits, context = rng.normal(0, 3, 1000).astype(np.float32), rng.integers(0, 1000, 200).tolist()
        params = SamplingParams(mode="sample", temperature=0.8, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
        chain = processors.LogitsProcessorList(
            [
                processors.RepetitionPenaltyLogitsProcessor(1.2),
                processors.TemperatureLogitsWarper(0.8),
                processors.TopKLogitsWarper(60),
                processors.TopPLogitsWarper(0.9),
                processors.MinPLogitsWarper(0.01),
            ]
        )
        theirs = torch.softmax(chain(torch.tensor([context]), torch.tensor(logits)[None]), -1)[0].numpy()
        ours = weights(params, scores(params, logits, context, 100))
        np.testing.assert_allclose(ours / ours.sum(), theirs, rtol=2e-5, atol=1e-9)
