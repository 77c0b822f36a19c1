"""``medusa-deploy bench``: plain against Medusa decoding on the same engine, prompt by prompt, in one run."""

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
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Bench and print. Returns 1 when the ways of decoding emitted different tokens, unless the graph rounds to 8 bits."""
    from ..console import Progress, emit
    from ..engine_options import load_session
    from ..environment import environment
    from ..measure.bench import bench, ways_of
    from ..measure.bench_report import describe
    from ..prompt_source import prompts_for

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


def _tree(manifest: Manifest, name: str | None, seed: int) -> tuple[Tree | None, str]:
    """Read the tree asked for, and say what was cut from it to fit."""
    from ..tree_set import trees_for

    if name is None:
        return None, ""
    chosen = trees_for(manifest, [name], seed)
    [(key, tree)] = chosen.trees.items()
    return tree, chosen.notes.get(key, "")
