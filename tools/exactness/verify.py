"""Decodes prompts plainly and speculatively with one bundle and compares the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...runtime.arguments import flag, integer, number
from ...runtime.request import Request
from ...runtime.sampling import SamplingParams
from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY, Tree
from ..console import table
from ..measure.timed_run import GREEDY, Way
from ..prompt_source import check_room
from .first_divergence import DivergenceFinder, Tally, describe_divergence
from .reference import Reference
from .rounding import tolerance_of

Advance = Callable[[int, str], object]
Save = Callable[[dict[str, Any]], object]
BEST_ROWS, AUTOMATIC = "best-rows", "automatic"
_TOGETHER = "together, "
_COUNTS = ("prompts", "tokens_compared", "divergences", "explained", "unexplained")


def verify(
    session: Session,
    prompts: Sequence[list[int]],
    *,
    trees: Mapping[str, Tree],
    best_rows: bool = False,
    max_new_tokens: int = 64,
    sample: SamplingParams | None = None,
    reference: Reference | None = None,
    tolerance: float | None = None,
    progress: Advance = lambda _done, _note: None,
    save: Save = lambda _report: None,
) -> dict[str, Any]:
    """Decode every prompt plainly once, then with every tree, and compare.

    ``best_rows`` adds two runs without a tree. Each of their steps takes the rows that promise most, prompt lookup included:
    as many as the bundle's tree has (``best-rows``), or as many as pay, as sessions draft by default (``automatic``).

    A session of several slots also decodes all prompts together, in a random order, plainly and in those two ways. Whoever else
    decodes must change no token: these runs, too, are compared with plain decoding alone.

    Sequences run to ``max_new_tokens``, past end-of-sequence tokens. Where a tree first differs from plain decoding, the
    position is computed again in several ways; their measured noise explains the difference or doesn't (:mod:`.rounding`).
    Tokens after a divergence aren't compared: their context differs.

    ``sample`` holds sampling parameters with a seed (prompt i takes seed + i); None decodes greedily. ``reference`` is another
    implementation to compare plain greedy decoding with. ``tolerance`` is the largest noise that counts as rounding, as a share
    of the largest logit; None takes the dtype's. ``progress(done, note)`` follows each run, of each way and each prompt.
    ``save`` gets the report so far after each prompt.

    Raises:
        CapacityError: a prompt and its answer don't fit.
        TreeError: a tree doesn't fit the bundle.
    """
    best_rows, max_new_tokens = flag("best_rows", best_rows), integer("max_new_tokens", max_new_tokens, 64)
    tolerance = number("tolerance", tolerance, None)
    check_room(session, list(prompts), max_new_tokens)
    finder = DivergenceFinder(session, tolerance_of(session) if tolerance is None else tolerance)
    ways = {name: Way(tree) for name, tree in trees.items()}
    if best_rows:
        ways |= {BEST_ROWS: Way(rows=session.tree.rows, lookup=True), AUTOMATIC: Way(lookup=True)}
    tallies = {name: Tally() for name in ways}
    against = Tally()
    shapes: dict[str, dict[str, Any]] = {
        name: {"rows": tree.rows, "depth": tree.depth, "choices": tree.choices()} for name, tree in trees.items()
    }
    depth = session.manifest.heads.num_heads
    shapes |= {BEST_ROWS: {"rows": session.tree.rows, "depth": depth}, AUTOMATIC: {"rows": None, "depth": depth}}
    shared = {"plain": Way(ROOT_ONLY), **{name: way for name, way in ways.items() if name in (BEST_ROWS, AUTOMATIC)}}
    shared = {f"{_TOGETHER}{name}": way for name, way in shared.items()} if session.slots.slots > 1 else {}
    tallies |= {name: Tally() for name in shared}
    shapes |= {name: {"rows": way.tree.rows if way.tree else way.rows, "depth": None} for name, way in shared.items()}
    alone: list[list[int]] = []
    done, started = 0, time.perf_counter()

    def report_after(count: int) -> dict[str, Any]:
        report: dict[str, Any] = {
            "mode": "greedy" if sample is None else sample.mode,
            "prompts": count,
            "max_new_tokens": max_new_tokens,
            "tolerance": finder.tolerance,
            "slots": session.slots.slots,
            "trees": {name: {**shapes[name], **tally.report()} for name, tally in tallies.items()},
        }
        if reference is not None:
            report["reference"] = {**reference.facts, **against.report()}
        compared = [*report["trees"].values(), *([report["reference"]] if reference is not None else [])]
        report["unexplained"] = sum(entry["unexplained"] for entry in compared)
        report["seconds"] = time.perf_counter() - started
        return report

    def params_of(index: int) -> SamplingParams | None:
        return None if sample is None else replace(sample, seed=(sample.seed or 0) + index)

    for index, prompt in enumerate(prompts):
        params = params_of(index)
        options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        if params is not None:
            options["params"] = params
        plain = session.generate(speculative=False, **options).token_ids
        alone.append(plain)
        progress(done := done + 1, f"prompt {index + 1}, plain")
        for name, way in ways.items():
            run = session.generate(**{**way.options, **options})
            tallies[name].count(run.stats)
            finder.add(tallies[name], index, prompt, plain, run.token_ids, params, way.tree or session.tree)
            progress(done := done + 1, f"prompt {index + 1}, {name}")
        if reference is not None:
            finder.add(against, index, prompt, plain, reference.generate(prompt, max_new_tokens), params, reference)
            progress(done := done + 1, f"prompt {index + 1}, reference")
        save(report_after(index + 1))
    for name, way in shared.items():
        order = np.random.default_rng(0).permutation(len(prompts)).tolist()
        fields = {**way.options, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        requests = [Request(token_ids=prompts[index], **{**fields, "params": params_of(index) or GREEDY}) for index in order]
        for at, run in session.generate_many(requests):
            index = order[at]
            tallies[name].count(run.stats)
            finder.add(
                tallies[name], index, prompts[index], alone[index], run.token_ids, params_of(index), way.tree or session.tree
            )
            progress(done := done + 1, f"prompt {index + 1}, {name}")
        save(report_after(len(prompts)))
    return report_after(len(prompts))


def describe(report: Mapping[str, Any]) -> str:
    """Write the report for a person: the verdict, a table, and every divergence that nothing explains."""
    unexplained = report["unexplained"]
    verdict = "no unexplained divergence" if not unexplained else f"{unexplained} UNEXPLAINED divergences"
    entries = dict(report["trees"])
    if "sampled" in report:
        entries |= {f"{name}, sampled": entry for name, entry in report["sampled"]["trees"].items()}
    if "reference" in report:
        entries["transformers"] = report["reference"]
    rows = [
        [name, entry.get("rows"), entry.get("depth"), *(entry[key] for key in _COUNTS), _length(entry)]
        for name, entry in entries.items()
    ]
    headers = [
        "against plain",
        "rows",
        "depth",
        "prompts",
        "tokens",
        "divergences",
        "explained",
        "unexplained",
        "mean acceptance length",
    ]
    lines = [f"{verdict} in {report['prompts']} prompts × {report['max_new_tokens']} tokens", "", table(rows, headers)]
    lines += [f"{name}: {note}" for name, note in report.get("notes", {}).items()]
    lines += [f"{name}: skipped, {reason}" for name, reason in report.get("skipped", {}).items()]
    for name, entry in entries.items():
        for found in entry["first_divergences"]:
            if not found["explained"]:
                lines.append(describe_divergence(name, found))
    return "\n".join(lines)


def _length(entry: Mapping[str, Any]) -> str | None:
    length = entry["mean_acceptance_length"]
    return None if length is None else f"{length:.2f}"
