"""One size of the figure: its bundles and their variants in one run, whose ways take turns prompt by prompt.

Usage: ``python benchmarks/model_sizes.py LABEL BUNDLE [BUNDLE …]``: Medusa-1, then Medusa-2. Every bundle and variant gets a
report as ``medusa-deploy bench`` writes it, with ``label``, ``stage``, ``precision`` and ``by_category`` in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medusa_deploy.runtime import Session, load
from medusa_deploy.runtime.text.prompts import PromptLine
from medusa_deploy.tools.console import write_json
from medusa_deploy.tools.environment import environment
from medusa_deploy.tools.measure.bench import session_report, ways_of
from medusa_deploy.tools.measure.bench_report import describe, summarise
from medusa_deploy.tools.measure.timed_run import TimedRun, in_turn, timed_run
from medusa_deploy.tools.prompt_source import heldout_prompts

RESULTS = Path(__file__).parent / "results"
VARIANTS = {"cpu": "fp32", "cpu-int8": "int8", "cpu-int4": "int4"}
_WARMUP_TOKENS = 16
Runs = dict[str, list[list[TimedRun]]]


def interleaved(
    sessions: Mapping[str, Session], lines: Sequence[PromptLine], fixed_rows: Sequence[int], tokens: int
) -> dict[str, Runs]:
    """Decode every prompt in every way of every session, once; runs [way][prompt][0] by session."""
    ways = {(name, way): how for name, session in sessions.items() for way, how in ways_of(session, None, fixed_rows).items()}
    runs: dict[str, Runs] = {name: {} for name in sessions}
    for (name, _), how in ways.items():
        timed_run(sessions[name], sessions[name].encode(lines[0].request()), how, _WARMUP_TOKENS)
    for index, line in enumerate(lines):
        for name, way in in_turn(ways, index):
            run = timed_run(sessions[name], sessions[name].encode(line.request()), ways[name, way], tokens)
            runs[name].setdefault(way, []).append([run])
        print(f"prompt {index + 1} of {len(lines)}", file=sys.stderr)
    return runs


def by_category(runs: Runs, lines: Sequence[PromptLine]) -> dict[str, dict[str, float]]:
    """Speed-up of each way and its mean acceptance length, by category of the prompts."""
    found = {}
    for category in sorted({str(line.category) for line in lines}):
        chosen = [index for index, line in enumerate(lines) if str(line.category) == category]
        summary = summarise({way: [each[index] for index in chosen] for way, each in runs.items()})
        found[category] = {
            f"{way}_{key}": summary[way][key] for way in runs if way != "plain" for key in ("speedup", "mean_acceptance_length")
        }
    return found


def report(session: Session, runs: Runs, lines: Sequence[PromptLine], tokens: int) -> dict[str, Any]:
    """The report of one session, with the fields of ``bench``."""
    return {
        "environment": environment(session) | {"threads": None, "backend": "cpu"},
        "prompts": len(lines),
        "repeats": 1,
        "max_new_tokens": tokens,
        **session_report(session, runs),
        "by_category": by_category(runs, lines),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label", help='of the model in tables and in the figure, for instance "SmolLM2 135M"')
    parser.add_argument("bundles", type=Path, nargs="+", help="Medusa-1, then Medusa-2")
    parser.add_argument("--variants", default="cpu,cpu-int8", help="those that every bundle has (default: %(default)s)")
    parser.add_argument("--count", type=int, default=32, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--fixed-rows", default="", help="also measure so many rows in every step, for instance 4,8")
    args = parser.parse_args()
    lines, fixed = heldout_prompts()[: args.count], [int(rows) for rows in args.fixed_rows.split(",") if rows]
    sessions, names = {}, {}
    for stage, bundle in enumerate(args.bundles, start=1):
        for variant in args.variants.split(","):
            precision = VARIANTS.get(variant, variant)
            name = f"{args.label.lower().replace(' ', '-')}-medusa-{stage}-{precision}"
            names[name] = {"label": args.label, "stage": stage, "precision": precision}
            sessions[name] = load(bundle, variant=variant)
    runs = interleaved(sessions, lines, fixed, args.max_new_tokens)
    for name, session in sessions.items():
        found = names[name] | report(session, runs[name], lines, args.max_new_tokens)
        write_json(found, RESULTS / f"{name}.json")
        print(f"{name}\n{describe(found)}\n")
        for category, ways in found["by_category"].items():
            print(f"{category}: " + ", ".join(f"{way} {value:.2f}" for way, value in ways.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
