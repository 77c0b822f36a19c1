"""Compares runs token by token and gathers the evidence about their first divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.request import Stats
from ...runtime.sampling import SamplingParams
from ...runtime.session import Session
from ...runtime.tree import Tree
from ..measure.probe import Probe
from .reference import Reference
from .rounding import Evidence, judge_argmax, judge_draw


@dataclass(slots=True)
class Tally:
    """Findings of comparing one tree (or the reference) with plain decoding, over all prompts."""

    prompts: int = 0
    tokens_compared: int = 0
    divergences: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    accepted: int = 0

    def count(self, stats: Stats) -> None:
        """Add the steps of one speculative run."""
        self.steps += stats.steps
        self.accepted += sum(accepted * steps for accepted, steps in stats.accepted.items())

    def report(self) -> dict[str, Any]:
        """The tally as JSON; ``mean_acceptance_length`` is 1 + accepted drafted tokens per step."""
        explained = sum(divergence["explained"] for divergence in self.divergences)
        return {
            "prompts": self.prompts,
            "tokens_compared": self.tokens_compared,
            "divergences": len(self.divergences),
            "explained": explained,
            "unexplained": len(self.divergences) - explained,
            "mean_acceptance_length": 1 + self.accepted / self.steps if self.steps else None,
            "first_divergences": self.divergences,
        }


@dataclass(frozen=True, slots=True)
class DivergenceFinder:
    """Finds first divergences and gathers the evidence about them."""

    session: Session
    tolerance: float

    def add(
        self,
        tally: Tally,
        index: int,
        prompt: list[int],
        plain: list[int],
        other: list[int],
        params: SamplingParams | None,
        source: Tree | Reference,
    ) -> None:
        """Compare the run ``other``, made by ``source``, with ``plain``."""
        tally.prompts += 1
        position = first_divergence(plain, other)
        if position is None:
            tally.tokens_compared += len(plain)
            return
        tally.tokens_compared += position + 1
        pair = tuple(run[position] if position < len(run) else None for run in (plain, other))
        evidence = self._evidence(prompt, plain[:position], pair, params, source)
        tally.divergences.append(
            {
                "prompt": index,
                "position": position,
                "plain_token": pair[0],
                "other_token": pair[1],
                "gap": evidence.gap,
                "noise": evidence.noise,
                "limit": evidence.limit,
                "explained": evidence.explained,
            }
        )

    def _evidence(
        self,
        prompt: list[int],
        common: list[int],
        pair: tuple[int | None, ...],
        params: SamplingParams | None,
        source: Tree | Reference,
    ) -> Evidence:
        first, second = pair
        if first is None or second is None:  # one run is shorter: rounding can't do that
            return Evidence(gap=math.inf, noise=0.0, limit=0.0)
        context = [*prompt, *common]
        with Probe(self.session) as probe:
            computed = [probe.replay(prompt, common), probe.prefill(context)]
            if isinstance(source, Tree):
                probe.restart(context[:-1])
                computed.append(probe.root_logits(context[-1], source))
            else:
                computed.insert(0, source.logits(context))
        if params is None:
            return judge_argmax(computed, (first, second), self.tolerance)
        return judge_draw(computed, (first, second), self.tolerance, params, context, len(prompt))


def first_divergence(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """First position where two runs differ, or where the shorter one ends; None when they are equal."""
    for position, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))


def describe_divergence(name: str, found: Mapping[str, Any]) -> str:
    """Describe one entry of ``first_divergences``: its place, both tokens, gap and noise."""
    place = f"{name}: prompt {found['prompt'] + 1}, token {found['position'] + 1}"
    measured = f"gap {found['gap']:.3g}, noise {found['noise']:.3g} (limit {found['limit']:.3g})"
    return f"{place}: {found['plain_token']} plain, {found['other_token']} here; {measured}"
