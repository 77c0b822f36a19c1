"""``medusa-deploy tree``: count the heads' hits on the engine at hand, find the best tree of every size, and pick the size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..measure.hit_table import HitTable

HELP = "count the heads' hits on held-out prompts and find the best candidate tree of every size"
TIMED_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, positive_int
    from ..engine_options import add_engine_arguments
    from ..prompt_source import add_prompt_arguments

    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="not needed with --table and --rows")
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=96, metavar="N", help="per prompt (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="tree file to write")
    parser.add_argument("--choices", type=Path, metavar="FILE", help="also write the tree as Medusa's plain list of paths")
    parser.add_argument("--table", type=Path, metavar="FILE", help="count nothing: take the hit rates from this tree file")
    parser.add_argument("--rows", type=positive_int, metavar="N", help="size of the tree (default: the fastest)")
    parser.add_argument("--seed", type=int, default=0, help="of random prompts (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the files")
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Count, search, print and write."""
    from ...runtime.errors import TreeError, UsageError
    from ...runtime.files.bundle import open_bundle, refuse_existing, sha256
    from ...runtime.files.manifest import MANIFEST_NAME
    from ...runtime.tree import Tree
    from ..console import emit, write_json
    from ..measure.hit_table import read_hit_table
    from ..measure.tree_search import search
    from ..tree_set import check_runs

    for path in (args.output, args.choices):
        if path is not None:
            refuse_existing(path, force=args.force)
    if args.bundle is None and args.table is None:
        raise UsageError("neither a bundle nor a table of hit rates is given", hint="give BUNDLE, or --table FILE")
    bundle = None if args.bundle is None else open_bundle(args.bundle, check_hashes=False)
    if bundle is not None and args.rows is not None and args.rows > bundle.manifest.limits.max_rows:
        raise UsageError(
            f"{args.rows} rows, the bundle allows {bundle.manifest.limits.max_rows}",
            hint="give fewer --rows, or export with a larger --max-rows",
        )
    if args.table is None:
        table, times, origin = _measure(args, None)
    else:
        table, times, origin = read_hit_table(args.table)
        if bundle is not None and args.rows is None:
            table, times, measured = _measure(args, table)
            origin |= measured
    report: dict[str, Any] = {**search(table, times, args.rows), "provenance": origin}
    if bundle is not None:
        try:
            check_runs(Tree.from_choices(report["choices"]), bundle.manifest, "the tree found")
        except TreeError as error:
            raise TreeError(
                f"the tree of {report['rows']} rows doesn't fit {args.bundle}: {error.message}",
                hint="leave --table out, so that hits are counted on this bundle; or give fewer --rows",
            ) from None
        origin["fits"] = {"manifest_sha256": sha256(bundle.path(MANIFEST_NAME))}
    write_json(report, args.output)
    if args.choices is not None:
        write_json(report["choices"], args.choices)
    emit(f"{describe(report)}\n\n{args.output}", report, args.json)
    return 0


def _measure(args: argparse.Namespace, table: HitTable | None) -> tuple[HitTable, dict[int, float], dict[str, Any]]:
    """Count hit rates if there are none yet, and measure step times. Returns both and their origins.

    Both are of the engine that the arguments name.
    """
    from ...runtime.text.prompts import prompts_digest
    from ..console import Progress
    from ..engine_options import load_session
    from ..environment import environment
    from ..measure.hit_table import count_hits
    from ..measure.row_sweep import row_sweep
    from ..prompt_source import check_room, prompts_for

    session = load_session(args)
    here = {"environment": environment(session) | {"backend": args.backend}}
    origin: dict[str, Any] = {"times": here}
    with Progress("count") as bar:
        if table is None:
            prompts = prompts_for(session, args.prompts, args.count, args.seed)
            check_room(session, prompts, args.max_new_tokens)
            bar.phase("count", len(prompts))
            table = count_hits(session, prompts, args.max_new_tokens, bar.update)
            origin["hits"] = here | {
                "prompts": len(prompts),
                "prompts_sha256": prompts_digest(prompts),
                "max_new_tokens": args.max_new_tokens,
                "positions": table.positions,
            }
        bar.phase("step times")
        times = row_sweep(session, sizes=TIMED_SIZES, rounds=9, progress=bar.update)["ms_by_rows"]
    return table, times, origin


def describe(report: Mapping[str, Any]) -> str:
    """Write a line for each size that was timed, with the chosen one marked. The file has every size."""
    from ..console import table
    from ..measure.hit_table import OVER_POSITIONS

    shown = [entry for entry in report["sizes"] if "speedup" in entry or entry["rows"] == report["rows"]]
    rows = [
        [
            f"{entry['rows']}{' *' if entry['rows'] == report['rows'] else ''}",
            f"{entry['expected_acceptance_length']:.3f}",
            f"{entry['independent_counted']:.3f}",
            f"{entry['independent']:.3f}",
            f"{entry['ms_per_step']:.2f}" if "ms_per_step" in entry else None,
            f"{entry['speedup']:.2f}×" if "speedup" in entry else None,
        ]
        for entry in shown
    ]
    headers = [
        "rows",
        "expected acceptance length",
        "of the independent tree",
        "which promises",
        "ms a step",
        "expected speed-up",
    ]
    chosen = f"tree of {report['rows']} rows: {report['expected_acceptance_length']:.3f} tokens a step expected"
    lines = [f"{chosen}, counted at {report['table']['positions']} positions"]
    if report["expected_by"] == "rates":
        lines.append(f"expected {OVER_POSITIONS}")
    origin = report["provenance"]
    if "table" in origin["hits"]:
        times = "no step times" if "times" not in origin else "its step times" if "table" in origin["times"] else "new step times"
        lines.append(f"hit rates of {origin['hits']['table']['file']}, {times}")
    return "\n".join([*lines, "", table(rows, headers)])
