"""``medusa-deploy bench``: plain against Medusa decoding on one engine, in one run: prompt by prompt, or several at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...runtime.files.manifest import Manifest
    from ...runtime.tree import Tree

HELP = "measure plain against Medusa decoding, interleaved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, non_negative, positive_int, positive_ints
    from ..engine_options import add_engine_arguments
    from ..prompt_source import add_prompt_arguments

    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens per prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="times every prompt runs (default: %(default)s)")
    parser.add_argument(
        "--tree", metavar="NAME|FILE", help="also measure a fixed tree: one of the bundle's, or as in verify --trees"
    )
    parser.add_argument("--rows", type=positive_int, metavar="N", help="rows of a step (default: as many as pay)")
    parser.add_argument(
        "--fixed-rows", type=positive_ints, default=(), metavar="N,N,…", help="also measure so many rows in every step"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure the step time for 1 to 16 rows, and the tree size it suggests"
    )
    parser.add_argument(
        "--temperature", type=non_negative, default=0.0, metavar="T", help="sample; measures typical acceptance, too (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples, random prompts and trees (default: %(default)s)")
    parser.add_argument(
        "--slots",
        type=positive_ints,
        metavar="N,N,…",
        help="answer so many prompts at a time instead: plainly, with fixed and with chosen rows",
    )
    parser.add_argument(
        "--long-prompt",
        type=positive_int,
        metavar="N",
        help="let a prompt of N tokens arrive while others stream, as many as --slots says (default 4)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report of --slots as a page of its own")
    parser.add_argument("--force", action="store_true", help="replace the file of --html")
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Bench and print.

    Returns 1 when the ways of decoding emitted different tokens, unless the graph rounds to 8 bits.
    """
    from ...runtime.errors import UsageError
    from ..console import Progress, emit
    from ..engine_options import load_session
    from ..environment import environment
    from ..measure.bench import bench, ways_of
    from ..measure.bench_report import describe
    from ..prompt_source import prompts_for

    if args.slots or args.long_prompt:
        return _run_slots(args)
    if args.html is not None:
        raise UsageError("--html is of the report of --slots", hint="add --slots 1,2,4,8")
    session = load_session(args)
    tree, note = _tree(session.manifest, args.tree, args.seed)
    prompts = prompts_for(session, args.prompts, args.count, args.seed)
    ways = ways_of(session, args.rows, args.fixed_rows, tree, args.temperature, args.seed)
    with Progress("bench", len(ways) * len(prompts) * args.repeats) as bar:
        options = {name: getattr(args, name) for name in ("temperature", "seed", "max_new_tokens", "repeats")}
        options["progress"] = bar.update
        report = bench(session, prompts, rows=args.rows, fixed_rows=args.fixed_rows, tree=tree, **options)
        if args.sweep:
            from ..measure.row_sweep import row_sweep

            bar.phase("sweep")
            report["sweep"] = row_sweep(session, progress=bar.update)
    facts = environment(session) | {"threads": args.threads, "backend": args.backend}
    report = {"environment": facts, **report} | ({"tree_note": note} if note else {})
    emit(describe(report), report, args.json)
    return 1 if report["equal"]["different"] and not report["rounds_activations"] else 0


def _run_slots(args: argparse.Namespace) -> int:
    """Measure several prompts at a time, or a long prompt among streams. Returns as :func:`run`."""
    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import refuse_existing, write_whole
    from ..console import Progress, emit
    from ..engine_options import load_session
    from ..environment import environment
    from ..prompt_source import prompts_for
    from ..slots.bench import slots_bench
    from ..slots.long_prompt import describe_long_prompt, long_prompt_bench
    from ..slots.page import page
    from ..slots.report import describe

    asked = {"--tree": args.tree, "--rows": args.rows, "--sweep": args.sweep, "--temperature": args.temperature}
    if args.long_prompt is not None:
        asked["--html"] = args.html
    if unfit := [name for name, value in asked.items() if value]:
        mode = "--slots" if args.long_prompt is None else "--long-prompt"
        raise UsageError(f"{', '.join(unfit)} can't be measured with {mode}", hint="--fixed-rows names sizes to compare")
    slots = args.slots or (4,)
    if args.long_prompt is not None and len(slots) > 1:
        raise UsageError(f"--long-prompt takes one number of streams, not {len(slots)}", hint=f"--slots {slots[0]}")
    if args.html is not None:
        refuse_existing(args.html, force=args.force)
    session = load_session(args, slots=max(slots) + (args.long_prompt is not None))
    prompts = prompts_for(session, args.prompts, args.count, args.seed)
    options = {"fixed_rows": args.fixed_rows, "repeats": args.repeats}
    facts = environment(session) | {"threads": args.threads, "backend": args.backend}
    with Progress("bench") as bar:
        options["progress"] = bar.update
        if args.long_prompt is not None:
            report = long_prompt_bench(session, prompts, args.long_prompt, streams=slots[0], **options)
        else:
            report = slots_bench(session, prompts, slots, max_new_tokens=args.max_new_tokens, **options)
    report = {"environment": facts, **report}
    if args.html is not None:
        write_whole(args.html, page(report).encode())
    emit(describe(report) if args.long_prompt is None else describe_long_prompt(report), report, args.json)
    return 1 if args.long_prompt is None and report["equal"]["different"] and not report["rounds_activations"] else 0


def _tree(manifest: Manifest, name: str | None, seed: int) -> tuple[Tree | None, str]:
    """Read the tree asked for, and say what was cut from it to fit."""
    from ..tree_set import trees_for

    if name is None:
        return None, ""
    chosen = trees_for(manifest, [name], seed)
    [(key, tree)] = chosen.trees.items()
    return tree, chosen.notes.get(key, "")
