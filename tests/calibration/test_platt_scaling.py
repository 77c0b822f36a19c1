"""Platt scaling: how far a head's own probabilities are to be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime.drafting.hits import MISS, NO_LABEL

torch: Any = pytest.importorskip("torch")

from medusa_deploy.calibration.hit_rates import (  # noqa: E402
    Hits,
    platt_scaling,
)


def _answered(rng: np.random.Generator, slope: float, offset: float, positions: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and log-probabilities of a head whose candidates are right as often as the scaling says."""
    first = rng.uniform(0.1, 0.9, positions)
    chances = np.stack([first, (1 - first) * rng.uniform(0.1, 0.5, positions)], 1)
    right = 1 / (1 + np.exp(-(slope * np.log(chances / (1 - chances)) + offset)))
    drawn = rng.random(positions)
    rank = np.where(drawn < right[:, 0], 0, np.where(drawn < right.sum(1), 1, MISS))
    return rank, np.log(chances).astype(np.float32)


def test_scaling_is_found_again() -> None:
    ranks, log_probs = _answered(np.random.default_rng(0), 0.6, -1.2)
    [(slope, offset)] = platt_scaling(Hits(ranks[:, None], log_probs[:, None]))
    assert (slope, offset) == (pytest.approx(0.6, abs=0.05), pytest.approx(-1.2, abs=0.08))


def test_a_head_is_judged_where_the_heads_before_it_were_right() -> None:
    """The second head is right as often as it says behind a right token, and never behind a wrong one."""
    rng = np.random.default_rng(1)
    first, second = _answered(rng, 1.0, -0.5), _answered(rng, 1.0, 0.0)
    ranks = np.stack([first[0], np.where(first[0] >= 0, second[0], MISS)], 1)
    scaling = platt_scaling(Hits(ranks, np.stack([first[1], second[1]], 1)))
    np.testing.assert_allclose(scaling, [(1.0, -0.5), (1.0, 0.0)], atol=0.1)


def test_nothing_to_learn_from_leaves_heads_as_they_are() -> None:
    nothing = np.full((5, 2), NO_LABEL)
    assert platt_scaling(Hits(nothing, np.zeros((5, 2, 3), np.float32))) == [(1.0, 0.0)] * 2


def test_a_head_that_is_right_when_it_is_unsure_gets_no_negative_slope() -> None:
    ranks, log_probs = _answered(np.random.default_rng(2), -1.0, 0.0)
    [(slope, _)] = platt_scaling(Hits(ranks[:, None], log_probs[:, None]))
    assert slope == 0
