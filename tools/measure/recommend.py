"""Finds the fastest of a bundle's CPU variants on this machine within a quality budget: by measuring, not by assumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY
from .kl import Divergence
from .timed_run import Way, timed_run

BUDGET = 0.005
"""Mean KL of next-token distributions against the float32 graph, in nats. At 0.002, two likeliest tokens in a hundred differ."""
_WAYS = {"plain": Way(ROOT_ONLY), "medusa": Way(lookup=True)}
_WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant as measured.

    ``plain`` and ``medusa`` are tokens/s over all prompts, prefill left out. ``divergence`` is the mean KL in nats,
    ``agreement`` the share of positions with the same likeliest token.
    """

    variant: str
    plain: float
    medusa: float
    divergence: float
    agreement: float

    @property
    def fastest(self) -> float:
        """Tokens/s of the faster way."""
        return max(self.plain, self.medusa)


def recommend(
    sessions: Mapping[str, Session],
    prompts: Sequence[list[int]],
    *,
    budget: float = BUDGET,
    max_new_tokens: int = 64,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> dict[str, Any]:
    """Time all ``sessions``, by variant, on the same prompts in turn, and compare their distributions with those of ``cpu``.

    Returns ``candidates``, fastest first, the ``budget``, and the ``recommended`` one: the fastest variant within it, and
    whether to speculate. ``progress(done, note)`` follows each of the 2 · variants · prompts runs.
    """
    seconds = {(name, way): 0.0 for name in sessions for way in _WAYS}
    tokens = dict.fromkeys(seconds, 0)
    for session in sessions.values():
        for way in _WAYS.values():
            timed_run(session, prompts[0], way, _WARMUP_TOKENS)
    done = 0
    for prompt in prompts:
        for name, session in sessions.items():
            for kind, way in _WAYS.items():
                run = timed_run(session, prompt, way, max_new_tokens)
                seconds[name, kind] += run.decode_seconds
                tokens[name, kind] += run.decoded
                progress(done := done + 1, f"{name}, {kind}")
    rates = {key: tokens[key] / spent if (spent := seconds[key]) else 0.0 for key in seconds}
    reference = Divergence(sessions["cpu"], prompts, max_new_tokens)
    found = []
    for name, session in sessions.items():
        divergence, agreement = reference.of_session(session)
        found.append(Candidate(name, rates[name, "plain"], rates[name, "medusa"], divergence, agreement))
    found.sort(key=lambda each: -each.fastest)
    best = next((each for each in found if each.divergence <= budget), min(found, key=lambda each: each.divergence))
    chosen = {"variant": best.variant, "speculative": best.medusa >= best.plain, "tokens_per_s": best.fastest}
    return {
        "budget": budget,
        "positions": reference.positions,
        "recommended": chosen,
        "candidates": [asdict(each) for each in found],
    }


def describe(report: Mapping[str, Any]) -> str:
    """Write a line for each variant, and which to use."""
    from ..console import table

    rows = [
        [
            each["variant"],
            f"{each['plain']:.1f}",
            f"{each['medusa']:.1f}",
            f"{each['divergence']:.4f}",
            f"{each['agreement']:.1%}",
            "yes" if each["divergence"] <= report["budget"] else "no",
        ]
        for each in report["candidates"]
    ]
    headers = ["variant", "plain tokens/s", "Medusa tokens/s", "KL to fp32, nats", "same likeliest token", "within budget"]
    chosen = report["recommended"]
    use = f"--variant {chosen['variant']}, {'with Medusa' if chosen['speculative'] else 'decoding plainly'}"
    return f"{table(rows, headers)}\n\nfastest here within the budget: {use}, {chosen['tokens_per_s']:.1f} tokens/s"
