"""What counts as an explanation of a divergence."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_deploy.runtime.sampling import SamplingParams, draw, uniform, weights
from medusa_deploy.tools.exactness.rounding import Evidence, judge_argmax, judge_draw


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_a_gap_within_the_noise_is_explained():
    evidence = judge_argmax([logits(5.0, 4.9999, -3), logits(4.9999, 5.0, -3)], (0, 1), 1e-3)
    assert evidence.gap == pytest.approx(1e-4, rel=1e-2)
    assert evidence.explained


def test_a_gap_beyond_the_noise_is_not():
    assert not judge_argmax([logits(5.0, 4.99, -3), logits(4.9999, 4.99, -3)], (0, 1), 1e-3).explained


def test_a_token_that_is_no_candidate_is_not():
    assert not judge_argmax([logits(5.0, 4.9999, -3), logits(4.9999, 5.0, -3)], (0, 2), 1e-3).explained


def test_equal_computations_explain_nothing_but_an_exact_tie():
    row = logits(5.0, 5.0, 4.0)
    assert judge_argmax([row, row], (0, 1), 1e-3).explained
    assert not judge_argmax([row, row], (0, 2), 1e-3).explained


def test_a_difference_too_large_for_rounding_excuses_nothing():
    """A graph that is wrong in one of the ways makes noise of any size."""
    evidence = judge_argmax([logits(5.0, 4.0, -3), logits(1.0, 5.0, 2)], (0, 1), 1e-3)
    assert evidence.gap < evidence.noise
    assert not evidence.explained


def test_the_limit_grows_with_the_logits():
    assert judge_argmax([logits(500, 499.9), logits(499.9, 500)], (0, 1), 1e-3).explained
    assert not judge_argmax([logits(5.0, 4.9), logits(4.9, 5.0)], (0, 1), 1e-3).explained


def test_the_noisiest_computation_counts():
    near = logits(5.0, 4.9999, -3)
    assert judge_argmax([near, near, logits(4.9999, 5.0, -3)], (0, 1), 1e-3).explained


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite_explain_nothing(broken: float):
    row = logits(5.0, 4.9999, -3)
    for computed in ([row, logits(5.0, broken, -3)], [logits(5.0, broken, -3), row], [row, row, logits(5, 4, broken)]):
        assert not judge_argmax(computed, (0, 1), 1e-3).explained


def test_evidence_of_nan_explains_nothing():
    assert not Evidence(float("nan"), 1.0, 1.0).explained
    assert not Evidence(0.0, float("nan"), 1.0).explained


def border_case(shift: float) -> tuple[list[np.ndarray], tuple[int, int], SamplingParams, list[int]]:
    """Logits of two tokens whose border lies ``shift`` beside the drawn number, and both sides of it as computed."""
    params, context = SamplingParams(mode="sample", seed=3), [7, 7, 7]
    point = uniform(3, len(context))
    borders = (point + 1e-6 + shift, point - 1e-6)
    computed = [np.log(np.array([border / 2, border / 2, 1 - border])).astype(np.float32) for border in borders]
    return computed, (1, 2), params, context


def test_a_draw_at_a_border_is_explained():
    computed, tokens, params, context = border_case(0)
    drawn = [draw(weights(params, row), uniform(3, len(context))) for row in computed]
    assert drawn == [1, 2]
    assert judge_draw(computed, tokens, 1e-3, params, context, 1).explained


def test_a_draw_away_from_every_border_is_not():
    computed, _, params, context = border_case(0)
    assert not judge_draw(computed, (1, 0), 1e-3, params, context, 1).explained


def test_a_border_that_moved_too_far_is_not():
    computed, tokens, params, context = border_case(0.01)
    assert not judge_draw(computed, tokens, 1e-3, params, context, 1).explained
