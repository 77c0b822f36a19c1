"""The best static tree against rows chosen in each step from the heads' probabilities, at equal size, on held-out prompts.

Usage: ``python benchmarks/tree_choice.py BUNDLE --json benchmarks/results/tree-choice.json``

Paths are counted on the first held-out prompts, the ways compared on the ones after them. Acceptance is no timing: a busy machine
changes nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from medusa_deploy.runtime import load
from medusa_deploy.runtime.tree import tree_of_paths
from medusa_deploy.tools.console import Progress, write_json
from medusa_deploy.tools.environment import environment
from medusa_deploy.tools.measure.hit_table import count_hits
from medusa_deploy.tools.measure.timed_run import Way, timed_run
from medusa_deploy.tools.prompt_source import prompts_for

SIZES = (5, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=12, help="prompts to count on, and as many to compare on")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    session = load(args.bundle, threads=args.threads, prefix_cache=False)
    prompts = prompts_for(session, None, 2 * args.count)
    with Progress("count", args.count) as bar:
        table = count_hits(session, prompts[: args.count], args.max_new_tokens, bar.update)
        sizes: dict[str, Any] = {}
        bar.phase("compare", len(SIZES))
        for done, rows in enumerate(SIZES, start=1):
            tree = tree_of_paths(table.paths, rows)
            ways = {"static": Way(tree), "chosen": Way(rows=rows, lookup=False)}
            runs = {name: [timed_run(session, prompt, way, args.max_new_tokens) for prompt in prompts[args.count :]]
                    for name, way in ways.items()}  # fmt: skip
            sizes[str(rows)] = {
                name: 1 + sum(n * steps for run in each for n, steps in run.accepted.items())
                / sum(sum(run.accepted.values()) for run in each)
                for name, each in runs.items()
            }  # fmt: skip
            sizes[str(rows)]["equal_output"] = all(a.tokens == b.tokens for a, b in zip(*runs.values(), strict=True))
            sizes[str(rows)]["expected_static"] = table.acceptance_length(tree)
            bar.update(done)
    report = {
        "environment": environment(session),
        "prompts": {"counted": args.count, "compared": args.count, "max_new_tokens": args.max_new_tokens},
        "positions_counted": table.positions,
        "mean_acceptance_length_by_rows": sizes,
    }
    write_json(report, args.json)
    print(sizes)


if __name__ == "__main__":
    main()
