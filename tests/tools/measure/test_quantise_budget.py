"""Which products keep more bits: those that spoil most for their bytes, and no more of them than the budget asks for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import QuantisationError
from medusa_deploy.tools.measure.quantise_budget import Sensitivity, fit_budget

PRODUCTS = {"a": Sensitivity(0.4, 100), "b": Sensitivity(0.1, 100), "c": Sensitivity(0.3, 10), "d": Sensitivity(0.0, 1000)}


def additive(kept: Mapping[str, int]) -> float:
    return sum(entry.divergence for name, entry in PRODUCTS.items() if name not in kept)


@pytest.mark.parametrize(
    ("budget", "kept"), [(1.0, ""), (0.79, "c"), (0.5, "c"), (0.49, "ca"), (0.1, "ca"), (0.05, "cab")]
)
def test_the_worst_for_their_bytes_come_first(budget: float, kept: str):
    choice = fit_budget(PRODUCTS, 8, budget, additive)
    assert set(choice.kept) == set(kept) and choice.divergence <= budget
    assert set(choice.kept.values()) <= {32}


def test_4_bits_go_to_8():
    assert fit_budget(PRODUCTS, 4, 0.79, additive).kept == {"c": 8}


@given(st.floats(0.5, 3.0), st.floats(0.01, 1.0))
def test_divergences_that_dont_add_up_are_measured_again(factor: float, budget: float):
    choice = fit_budget(PRODUCTS, 8, budget, lambda kept: factor * additive(kept))
    assert choice.divergence == factor * additive(choice.kept) <= budget


def test_a_budget_that_no_choice_keeps_is_an_error():
    with pytest.raises(QuantisationError, match=r"over the budget of 0\.1"):
        fit_budget(PRODUCTS, 8, 0.1, lambda kept: 0.2 + additive(kept))
