"""Faults at the loop's two seams: the plan that an executor gets, and the outcome that is made of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from medusa_deploy.runtime.executors.step_plan import StepPlan
from medusa_deploy.runtime.loop import loop
from medusa_deploy.runtime.loop.acceptance import Acceptance
from medusa_deploy.runtime.loop.scheduler import Turn


def wrong_plans(patch: pytest.MonkeyPatch, change: Callable[[StepPlan], StepPlan]) -> None:
    """Let every loop run changed plans."""
    right = loop.step_plan
    patch.setattr(loop, "step_plan", lambda *arguments, **options: change(right(*arguments, **options)))


def wrong_next_tokens(patch: pytest.MonkeyPatch, where: Callable[[Turn], bool], vocab: int) -> None:
    """Let every loop emit the token after the right one at the end of the steps ``where`` says yes."""
    right = loop.verify

    def verify(turns: list[Turn], *arguments: object) -> list[Acceptance | Exception]:
        outcomes = right(turns, *arguments)  # type: ignore[arg-type]
        return [_wrong(found, vocab) if where(turn) else found for turn, found in zip(turns, outcomes, strict=True)]

    patch.setattr(loop, "verify", verify)


def _wrong(found: Acceptance | Exception, vocab: int) -> Acceptance | Exception:
    if isinstance(found, Exception) or not found.tokens:
        return found
    return replace(found, tokens=[*found.tokens[:-1], (found.tokens[-1] + 1) % vocab])
