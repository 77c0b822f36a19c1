"""Log-probabilities and their divergence: by hand on a small case, invariant where they must be, refused where they aren't."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_deploy.calibration.distributions import kl_divergence, log_softmax
from medusa_deploy.runtime.errors import NumericsError


def test_log_probabilities_sum_to_1_and_ignore_what_is_added_to_all_logits() -> None:
    logits = np.random.default_rng(0).normal(scale=30, size=(5, 40)).astype(np.float32)
    found = log_softmax(logits)
    assert found.dtype == np.float64
    assert np.exp(found).sum(1) == pytest.approx(np.ones(5), rel=1e-12)
    assert log_softmax(logits.astype(np.float64) + 1e4) == pytest.approx(found, abs=1e-9)


def test_the_divergence_is_that_of_each_row_in_nats() -> None:
    p, q = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    assert kl_divergence(p, q) == pytest.approx([0.25 * np.log(2), 0])
    assert kl_divergence(p[1], p[0]) == pytest.approx(0.2 * np.log(0.4) + 0.3 * np.log(1.2) + 0.5 * np.log(2))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    with pytest.raises(NumericsError, match="NaN or infinite"):
        log_softmax(np.array([[0.0, broken]], np.float32))
