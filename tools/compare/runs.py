"""Two bundles answer the same prompts in turns: their speed, their acceptance, and how long their answers stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np

from ...runtime.session import Session
from ..exactness.first_divergence import DivergenceFinder, Tally, first_divergence
from ..exactness.rounding import tolerance_of
from ..measure.bench import ways_of
from ..measure.bench_report import summarise
from ..measure.timed_run import TimedRun, Way, timed_run

_WARMUP_TOKENS = 16
_EXAMPLES = 4
_RESAMPLES = 1000
PLAIN, MEDUSA, FIXED_ROWS = "plain", "medusa", "fixed_rows"
TURNS = 3
"""Runs of each side on each prompt."""


@dataclass(slots=True)
class Decoded:
    """One side's runs.

    ``runs``: way to one run for each prompt. ``exact``: speculative way to its tally against plain decoding. ``accepted``: for
    each prompt, the steps with a fixed number of rows, counted by accepted drafted tokens.
    """

    session: Session
    runs: dict[str, list[TimedRun]] = field(default_factory=lambda: {PLAIN: [], MEDUSA: []})
    exact: dict[str, Tally] = field(default_factory=lambda: {FIXED_ROWS: Tally(), MEDUSA: Tally()})
    accepted: list[Mapping[int, int]] = field(default_factory=list)

    @property
    def answers(self) -> list[list[int]]:
        """Plain greedy answers."""
        return [run.tokens for run in self.runs[PLAIN]]

    def exactness(self) -> dict[str, Any]:
        """Tallies by way, and the number of divergences that nothing explains."""
        reports = {name: tally.report() for name, tally in self.exact.items()}
        return {**reports, "unexplained": sum(report["unexplained"] for report in reports.values())}

    def speed(self) -> dict[str, Any]:
        """Rates, as :func:`..measure.bench.bench` reports them."""
        return summarise({name: [[run] for run in runs] for name, runs in self.runs.items()})


def take_turns(
    sessions: Mapping[str, Session],
    prompts: Sequence[list[int]],
    *,
    rows: int,
    max_new_tokens: int,
    tolerance: float | None = None,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> dict[str, Decoded]:
    """Answer every prompt on every side: plainly, as sessions draft by default, and with ``rows`` rows in every step.

    The first two are timed: they follow each other on each prompt and take turns in going first. Acceptance is counted on the
    third, because steps of a fixed number of rows from the heads alone are accepted alike on every machine. Every speculative
    answer is compared with the same side's plain one; ``tolerance`` is that of ``verify``.
    """
    sides = {name: Decoded(session) for name, session in sessions.items()}
    ways = {name: ways_of(session, None) for name, session in sessions.items()}
    turns = [(name, way) for name in sides for way in (PLAIN, MEDUSA)]
    for name, way in turns:
        timed_run(sessions[name], prompts[0], ways[name][way], min(max_new_tokens, _WARMUP_TOKENS))
    done = 0
    fixed = Way(rows=rows, lookup=False)
    for index, prompt in enumerate(prompts):
        first = index % len(turns)
        for name, way in [*turns, *turns][first : first + len(turns)]:
            sides[name].runs[way].append(timed_run(sessions[name], prompt, ways[name][way], max_new_tokens))
            progress(done := done + 1, f"prompt {index + 1}, {name.upper()} {way}")
        for name, side in sides.items():
            _fixed_rows(side, index, prompt, fixed, max_new_tokens, tolerance)
            progress(done := done + 1, f"prompt {index + 1}, {name.upper()} with {rows} rows")
    return sides


def _fixed_rows(side: Decoded, index: int, prompt: list[int], way: Way, max_new_tokens: int, tolerance: float | None) -> None:
    """Run once more with a fixed number of rows and count its acceptance. Compare both speculative runs with the plain one."""
    session = side.session
    run = session.generate(token_ids=prompt, max_new_tokens=max_new_tokens, **way.options)
    side.exact[FIXED_ROWS].count(run.stats)
    side.accepted.append(run.stats.accepted)
    finder = DivergenceFinder(session, tolerance_of(session) if tolerance is None else tolerance)
    plain = side.runs[PLAIN][index].tokens
    for name, tokens in ((FIXED_ROWS, run.token_ids), (MEDUSA, side.runs[MEDUSA][index].tokens)):
        finder.add(side.exact[name], index, prompt, plain, tokens, None, session.tree)


def acceptance(a: Decoded, b: Decoded) -> dict[str, Any]:
    """Mean acceptance lengths of the steps with a fixed number of rows, their ratio B/A, and an interval for it.

    ``ratio_95`` is the middle 95 % of the ratios when prompts are drawn anew. Other answers are accepted otherwise: that says
    nothing of the heads, and the interval shows what so few prompts can tell.
    """
    report: dict[str, Any] = {}
    counts = []
    for name, side in (("a", a), ("b", b)):
        steps = Counter[int]()
        for accepted in side.accepted:
            steps.update(accepted)
        by_prompt = [(sum(each.values()), sum(n * times for n, times in each.items())) for each in side.accepted]
        counts.append(np.array(by_prompt))  # [prompts, 2]: steps, accepted tokens
        histogram = [steps[count] for count in range(max(steps, default=0) + 1)]
        report[name] = {"mean_acceptance_length": float(_lengths(counts[-1].sum(0))), "histogram": histogram}
    drawn = np.random.default_rng(0).integers(0, len(by_prompt), (_RESAMPLES, len(by_prompt)))
    lengths = [_lengths(side[drawn].sum(1)) for side in counts]
    low, high = np.percentile(lengths[1] / lengths[0], (2.5, 97.5)).tolist()
    ratio = report["b"]["mean_acceptance_length"] / report["a"]["mean_acceptance_length"]
    return {**report, "ratio": ratio, "ratio_95": [low, high]}


def _lengths(counts: np.ndarray) -> np.ndarray:
    """Mean acceptance lengths [...] from sums [..., 2] of steps and of accepted tokens."""
    lengths: np.ndarray = 1 + counts[..., 1] / np.maximum(counts[..., 0], 1)
    return lengths


def greedy_agreement(a: Decoded, b: Decoded, prompts: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
    """Tokens for which the plain greedy answers of both sides are the same; an identical answer counts in full.

    ``same_after``: for n = 1, 2, …, the share of answers that are still the same after n tokens.
    """
    pairs = list(zip(a.answers, b.answers, strict=True))
    apart = [first_divergence(one, other) for one, other in pairs]
    common = [len(one) if at is None else at for (one, _), at in zip(pairs, apart, strict=True)]
    identical = sum(at is None for at in apart)
    # Show answers that differ first.
    shown = sorted(range(len(pairs)), key=lambda index: apart[index] is None)[:_EXAMPLES]
    return {
        "answers": len(pairs),
        "identical": identical,
        "identical_share": identical / len(pairs),
        "common_prefix": {"median": median(common), "mean": mean(common)},
        "answer_tokens": {"a": mean(len(one) for one, _ in pairs), "b": mean(len(other) for _, other in pairs)},
        "same_after": [sum(at is None or at >= n for at in apart) / len(pairs) for n in range(1, max_new_tokens + 1)],
        "per_answer": [
            {"common": length, "a": len(one), "b": len(other)} for (one, other), length in zip(pairs, common, strict=True)
        ],
        "examples": [
            {
                "prompt": _text(a.session, prompts[index]),
                "a": _text(a.session, pairs[index][0]),
                "b": _text(b.session, pairs[index][1]),
                "common_tokens": common[index],
            }
            for index in shown
        ],
    }


def _text(session: Session, tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens)) if session.codec is None else str(session.codec.decode(tokens))
