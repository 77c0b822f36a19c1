"""Chooses the matmuls that keep more bits, so that a quantised graph stays within a budget: measures each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...runtime.errors import QuantisationError

HIGHER = {4: 8, 8: 32}
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Cost of a matmul: the mean divergence in nats if only it is quantised, and the bytes that more bits would take."""

    divergence: float
    extra_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Holds the matmuls ``kept`` with more bits (bits by name), and the whole graph's ``divergence`` with them, in nats."""

    kept: Mapping[str, int]
    divergence: float


def fit_budget(
    sensitivities: Mapping[str, Sensitivity], bits: int, budget: float, measure: Callable[[Mapping[str, int]], float]
) -> Choice:
    """Give more bits to the matmuls that spoil most for their bytes, until the whole graph's divergence is in the budget.

    Divergences of single matmuls nearly add up to that of all together. So the whole is measured, and the sum that is aimed at is
    corrected by the ratio. ``measure`` takes bits by matmul and returns the divergence of the whole graph.

    Raises:
        QuantisationError: after four corrections the divergence is still over the budget.
    """
    order = sorted(
        sensitivities, key=lambda name: sensitivities[name].divergence / max(sensitivities[name].extra_bytes, 1), reverse=True
    )
    total = sum(entry.divergence for entry in sensitivities.values())
    choice = Choice({}, measure({}))
    aim = total
    for _ in range(_ROUNDS):
        if choice.divergence <= budget:
            return choice
        left = total - sum(sensitivities[name].divergence for name in choice.kept)
        aim = min(aim, left) * budget / choice.divergence
        kept, left = dict[str, int](), total
        for name in order:
            if left <= aim:
                break
            kept[name] = HIGHER[bits]
            left -= sensitivities[name].divergence
        choice = Choice(kept, measure(kept))
    if choice.divergence <= budget:
        return choice
    raise QuantisationError(
        f"with {len(choice.kept)} of {len(sensitivities)} matmuls in {HIGHER[bits]} bits the divergence is "
        f"{choice.divergence:.4g} nats, over the budget of {budget:.4g}",
        hint="allow more, take more bits, or keep the projection and the heads in 32 bits",
    )
