"""Measures what a grammar does to speculative decoding: acceptance on JSON extraction, and what masks cost.

Each prompt holds a short text and the names of the fields to extract. It is answered as free text, and under the JSON schema of
its fields: plainly, and with drafts. Plain and drafted answers under the grammar must be equal, and valid.

``mask_share`` is the time inside the grammar's matcher (masks, forced tokens, steps through the grammar, for drafting and for
acceptance) plus the time that masking logits takes, over the time of all decode steps. It leaves out that all logits leave the
engine, as they do for any request whose tokens the host chooses.

The report goes to ``results/guided.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.runtime import Generation, Grammar, Request, Rows, SamplingParams, Session, load
from medusa_deploy.runtime.grammar import Matcher
from medusa_deploy.runtime.request import AUTOMATIC
from medusa_deploy.runtime.tree import ROOT_ONLY
from medusa_deploy.tools.console import write_json

RESULTS = Path(__file__).parent / "results"
_TEXT, _NUMBER = {"type": "string", "maxLength": 60}, {"type": "integer", "minimum": 0, "maximum": 9999}


def _fields(**kinds: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}


def _one_of(*names: str) -> dict[str, Any]:
    return {"enum": list(names)}


_LIST = {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 1, "maxItems": 4}
# fmt: off
TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Maria Lopez, 34, lives in Madrid and has worked for our company as an engineer since 2015.",
     _fields(name=_TEXT, age=_NUMBER, city=_TEXT, occupation=_TEXT, employed_since=_NUMBER)),
    ("The Golden Fork on 12 Baker Street serves Italian food. Guests gave it four stars; a meal is about 25 dollars.",
     _fields(restaurant=_TEXT, address=_TEXT, cuisine=_TEXT, stars=_NUMBER, price_in_dollars=_NUMBER)),
    ("Order 5521: three blue T-shirts in size M, to be sent to Peter Novak in Prague by express mail.",
     _fields(order_number=_NUMBER, item=_TEXT, colour=_TEXT, size=_one_of("S", "M", "L", "XL"), quantity=_NUMBER, customer=_TEXT,
             city=_TEXT, shipping=_one_of("standard", "express"))),
    ("Flight LH 441 from Houston to Frankfurt leaves at 16:05 from gate D12 and is delayed by 40 minutes.",
     _fields(flight=_TEXT, origin=_TEXT, destination=_TEXT, departure_time=_TEXT, gate=_TEXT, delay_in_minutes=_NUMBER)),
    ("The patient, John Smith, is 58 years old, has a fever and a cough, and takes ibuprofen twice a day.",
     _fields(patient=_TEXT, age=_NUMBER, symptoms=_LIST, medication=_TEXT, times_a_day=_NUMBER)),
    ("I love this phone! The camera is great and the battery lasts two days, but it is heavy. 5 stars.",
     _fields(product=_TEXT, sentiment=_one_of("positive", "neutral", "negative"), strengths=_LIST, weaknesses=_LIST,
             stars=_NUMBER)),
    ("On May 3 2021 the city of Oslo opened a new library with 450000 books next to the opera house.",
     _fields(event=_TEXT, city=_TEXT, year=_NUMBER, building=_TEXT, books=_TEXT)),
    ("Anna's chocolate cake: mix flour, sugar, cocoa and four eggs, and bake it at 180 degrees for 45 minutes.",
     _fields(recipe=_TEXT, author=_TEXT, ingredients=_LIST, temperature_in_degrees=_NUMBER, minutes=_NUMBER)),
    ("Ticket 88: since yesterday's update the app crashes when I open a picture. Please help soon, it is urgent. Tom",
     _fields(ticket_number=_NUMBER, reporter=_TEXT, component=_TEXT, problem=_TEXT, priority=_one_of("low", "normal", "urgent"))),
    ("Dune was written by Frank Herbert and published in 1965. It is a science fiction novel of 412 pages.",
     _fields(title=_TEXT, author=_TEXT, year_of_publication=_NUMBER, genre=_TEXT, number_of_pages=_NUMBER)),
    ("Flat to rent in Lisbon: 2 bedrooms, 75 square metres, 1200 euros a month, pets are allowed.",
     _fields(city=_TEXT, bedrooms=_NUMBER, square_metres=_NUMBER, monthly_rent_in_euros=_NUMBER,
             pets_allowed={"type": "boolean"})),
    ("Germany beat Brazil 7 to 1 in the semi-final of the World Cup in Belo Horizonte in 2014.",
     _fields(sport=_TEXT, winner=_TEXT, loser=_TEXT, goals_of_winner=_NUMBER, goals_of_loser=_NUMBER, city=_TEXT,
             year=_NUMBER)),
)
# fmt: on


class TimedMatcher:
    """Adds up the time inside a matcher."""

    seconds = 0.0

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def _timed(self, call: Any, *arguments: Any) -> Any:
        began = time.thread_time()  # other programs of the machine don't count
        try:
            return call(*arguments)
        finally:
            TimedMatcher.seconds += time.thread_time() - began

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray:
        """See the protocol."""
        found: np.ndarray = self._timed(self._matcher.allowed, ahead)
        return found

    def admits(self, ahead: Sequence[int], token: int) -> bool:
        """See the protocol."""
        return bool(self._timed(self._matcher.admits, ahead, token))

    def only(self, ahead: Sequence[int] = ()) -> int | None:
        """See the protocol."""
        found: int | None = self._timed(self._matcher.only, ahead)
        return found

    def finished(self, ahead: Sequence[int] = ()) -> bool:
        """See the protocol."""
        return bool(self._timed(self._matcher.finished, ahead))

    def advance(self, tokens: Sequence[int]) -> None:
        """See the protocol."""
        self._timed(self._matcher.advance, tokens)


def messages(text: str, schema: dict[str, Any]) -> list[dict[str, str]]:
    """Ask for the fields of ``schema`` in ``text``."""
    names = ", ".join(schema["properties"])
    return [{"role": "user", "content": f"Extract {names} from this text as a JSON object.\n\n{text}"}]


def _apply_seconds(vocab_size: int) -> float:
    """Time of masking one row of logits, as acceptance does."""
    logits = np.random.default_rng(0).normal(size=vocab_size).astype(np.float32)
    mask = np.zeros(vocab_size, bool)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        np.where(mask, logits, np.float32(-np.inf))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _summary(runs: list[Generation], matcher: float, apply: float) -> dict[str, Any]:
    """Add up runs. ``matcher``: seconds inside matchers. ``apply``: seconds of masking one row."""
    steps = sum(run.stats.steps for run in runs)
    accepted = sum(count * length for run in runs for length, count in run.stats.accepted.items())
    seconds = sum(run.stats.decode_seconds for run in runs)
    tokens = sum(len(run.token_ids) for run in runs)
    found: dict[str, Any] = {
        "answers": len(runs), "tokens": tokens, "steps": steps, "mean_acceptance_length": round(1 + accepted / steps, 3),
        "rows": round(sum(run.stats.rows for run in runs) / steps, 2), "step_ms": round(1e3 * seconds / steps, 2),
        "tokens_per_second": round(sum(run.stats.emitted for run in runs) / seconds, 1),
    }  # fmt: skip
    if matcher:
        rows = steps + accepted  # rows that acceptance visits
        found |= {
            "matcher_us_per_step": round(1e6 * matcher / steps, 1),
            "apply_us_per_step": round(1e6 * apply * rows / steps, 1),
            "mask_share": round((matcher + apply * rows) / seconds, 4),
        }
    return found


Task = tuple[str, dict[str, Any]]


def measure(session: Session, tasks: Sequence[Task], count: int, rows: int, *, sampled: bool) -> dict[str, Any]:
    """Answer every task in every way, the ways in turn on each."""
    ways: dict[str, tuple[Any, bool]] = {
        "free": (AUTOMATIC, False), f"free rows={rows}": (Rows(rows), False), "grammar plain": (ROOT_ONLY, True),
        "grammar": (AUTOMATIC, True), f"grammar rows={rows}": (Rows(rows), True),
    }  # fmt: skip
    compiler = session.grammars.matcher
    session.grammars.matcher = lambda *given: TimedMatcher(compiler(*given))  # type: ignore[method-assign, assignment, return-value]
    runs: dict[str, list[Generation]] = {name: [] for name in ways}
    inside = dict.fromkeys(ways, 0.0)
    differing = invalid = cut = 0
    for number, (text, schema) in enumerate(tasks):
        said: dict[str, Generation] = {}
        for params in [SamplingParams(), SamplingParams(mode="sample", temperature=0.8, seed=number)][: 1 + sampled]:
            for name, (drafting, guided) in ways.items():
                TimedMatcher.seconds = 0.0
                request = Request(
                    messages=messages(text, schema), max_new_tokens=count, params=params, drafting=drafting,
                    grammar=Grammar.json(schema) if guided else None,
                )  # fmt: skip
                said[name] = session.submit(request).result()
                runs[name].append(said[name])
                inside[name] += TimedMatcher.seconds
            plain = said["grammar plain"]
            differing += sum(said[name].token_ids != plain.token_ids for name, way in ways.items() if way[1])
            cut += plain.finish_reason != "stop"
            if plain.finish_reason == "stop":
                invalid += set(json.loads(plain.text)) != set(schema["properties"])
        print(f"{number + 1} of {len(tasks)}: {plain.text[:100]}", file=sys.stderr, flush=True)
    session.grammars.matcher = compiler  # type: ignore[method-assign]
    apply = _apply_seconds(session.manifest.backbone.vocab_size)
    return {
        "ways": {name: _summary(found, inside[name], apply) for name, found in runs.items()},
        "differing": differing, "invalid": invalid, "cut": cut,
    }  # fmt: skip


def main() -> int:
    """Measure and write the report. Exit code 1: answers that differ or aren't valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", help="graph to run, such as cpu-int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sampled", action="store_true", help="sample each answer, too")
    parser.add_argument("--tasks", type=int, default=len(TASKS))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "guided.json")
    args = parser.parse_args()
    session = load(args.bundle, variant=args.variant, threads=args.threads, check_hashes=False, prefix_cache=False)
    found = measure(session, TASKS[: args.tasks], args.tokens, args.rows, sampled=args.sampled)
    ways = found["ways"]
    ratio = {
        name: round(ways[f"grammar{name}"]["mean_acceptance_length"] / ways[f"free{name}"]["mean_acceptance_length"], 3)
        for name in ("", f" rows={args.rows}")
    }
    facts = {"bundle": args.bundle.name, "variant": args.variant or "cpu", "tasks": args.tasks, "sampled": args.sampled}
    report = {**facts, "acceptance_ratio": ratio, **found}
    write_json(report, args.output)
    print(json.dumps(report, indent=1))
    return int(found["differing"] + found["invalid"] > 0)


if __name__ == "__main__":
    sys.exit(main())
