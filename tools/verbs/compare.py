"""``medusa-deploy compare``: what a variant, a quantised one for instance, loses against a reference, and what it wins."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..compare.budget import QualityBudget

HELP = "quality and speed of one bundle or variant against a reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, non_negative, positive_int
    from ..prompt_source import add_prompt_arguments

    budget = QualityBudget()
    parser.add_argument("bundle_a", type=Path, metavar="BUNDLE_A", help="the reference")
    parser.add_argument("bundle_b", type=Path, metavar="BUNDLE_B", help="what is compared with it; may be the same bundle")
    for side in ("a", "b"):
        parser.add_argument(
            f"--variant-{side}", metavar="NAME", help=f"which graph of BUNDLE_{side.upper()} runs (default: the fastest that can)"
        )
    add_prompt_arguments(parser)
    parser.add_argument("--limit", dest="count", type=int, help=argparse.SUPPRESS)  # another name of --count
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens per prompt (default: %(default)s)")
    parser.add_argument(
        "--rows", type=positive_int, metavar="N", help="rows of the steps whose acceptance is counted (default: A's tree's)"
    )
    parser.add_argument(
        "--max-perplexity-increase",
        type=non_negative,
        default=budget.max_perplexity_increase,
        metavar="PCT",
        help="the most that B's perplexity may be above A's, in percent (default: %(default)g)",
    )
    parser.add_argument(
        "--min-acceptance-ratio",
        type=non_negative,
        default=budget.min_acceptance_ratio,
        metavar="X",
        help="the least that B's mean acceptance length may be, as a share of A's (default: %(default)g)",
    )
    parser.add_argument("--tolerance", type=non_negative, metavar="X", help="as of verify (default: by dtype)")
    parser.add_argument("--seed", type=int, default=0, help="of random prompts (default: %(default)s)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="engine threads (default: all cores)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page that needs no other file")
    parser.add_argument("--force", action="store_true", help="replace the files of --html and --json")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write the reports. Returns 1 when B is over its budget."""
    from ...runtime import load
    from ...runtime.files.bundle import refuse_existing, write_whole
    from ..compare.comparison import compare
    from ..compare.page import page
    from ..compare.table import describe
    from ..console import STDOUT, Progress, emit
    from ..environment import environment
    from ..extras import require
    from ..prompt_source import heldout_prose, prompts_for

    for output in (args.html, None if args.json in (None, STDOUT) else Path(args.json)):
        if output is not None:
            refuse_existing(output, force=args.force)
    require("calibrate")
    with Progress("loading") as bar:
        a = load(args.bundle_a, variant=args.variant_a, threads=args.threads, prefix_cache=False)
        b = load(args.bundle_b, variant=args.variant_b, threads=args.threads, prefix_cache=False)
        facts = {"a": environment(a), "b": environment(b)}
        machine = {name: fact for name, fact in facts["a"].items() if name != "bundle"} | {"threads": args.threads}
        report = compare(
            a,
            b,
            prompts_for(a, args.prompts, args.count, args.seed),
            prose=heldout_prose(a.encoder),
            max_new_tokens=args.max_new_tokens,
            rows=args.rows,
            tolerance=args.tolerance,
            budget=QualityBudget(args.max_perplexity_increase, args.min_acceptance_ratio),
            threads=args.threads,
            progress=bar,
        )
    names = {"a": args.bundle_a.resolve().name, "b": args.bundle_b.resolve().name}
    sides = {side: {"name": names[side], **facts[side]["bundle"]} for side in names}
    report = {"environment": {**machine, **sides}, **report}
    if args.html is not None:
        write_whole(args.html, page(report).encode())
    emit(describe(report), report, args.json)
    return 0 if report["verdict"]["passed"] else 1
