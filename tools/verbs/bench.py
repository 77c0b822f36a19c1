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
    served = parser.add_argument_group("a server under load")
    served.add_argument(
        "--serve",
        action="store_true",
        help="serve the bundle, and measure requests that come at random moments, --streams at a time, and what HTTP costs",
    )
    served.add_argument("--rates", type=_rates, default=(0.5, 1.0, 2.0), metavar="N,N,…", help="requests/s (default: 0.5,1,2)")
    served.add_argument("--seconds", type=float, default=30.0, metavar="N", help="of each rate (default: 30)")
    served.add_argument("--streams", type=positive_int, default=64, metavar="N", help="clients at a time (default: 64)")
    served.add_argument("--server-slots", type=positive_int, metavar="N", help="slots of the server (default: serve's own)")
    served.add_argument("--peer", metavar="URL", help="another server with OpenAI's interface: it gets the same prompts as text")
    served.add_argument("--peer-model", metavar="NAME", help="the model's name there, where it needs one")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report of --slots or --serve as a page of its own")
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

    if args.serve:
        return _run_serve(args)
    if args.slots or args.long_prompt:
        return _run_slots(args)
    if args.html is not None:
        raise UsageError("--html is of the reports of --slots and --serve", hint="add --slots 1,2,4,8")
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


def _rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < rate < 1e6 for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no rates such as 0.5,1,2")
    return found


def _run_serve(args: argparse.Namespace) -> int:
    """Measure a server under load."""
    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import refuse_existing, write_whole
    from ..console import Progress, emit
    from ..engine_options import load_session
    from ..environment import environment
    from ..extras import require
    from ..prompt_source import check_room, prompts_for
    from ..slots.http_client import Server
    from ..slots.own_server import own_server
    from ..slots.serving import describe_serving, serving_bench, serving_page

    require("serve")
    others = ("tree", "rows", "sweep", "temperature", "slots", "long_prompt", "fixed_rows")
    if unfit := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]:
        raise UsageError(f"{', '.join(unfit)} can't be measured with --serve", hint="leave it out")
    if args.html is not None:
        refuse_existing(args.html, force=args.force)
    session = load_session(args)
    prompts = prompts_for(session, args.prompts, args.count, args.seed)
    check_room(session, prompts, args.max_new_tokens)
    given = {"--backend": args.backend, "--target": args.target, "--variant": args.variant, "--threads": args.threads}
    given |= {"--slots": args.server_slots, "--max-waiting": 4 * args.streams, "--max-concurrency": 8 * args.streams}
    options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    facts = environment(session) | {"threads": args.threads, "backend": args.backend, "server": options}
    names = ("seconds", "streams", "max_new_tokens", "repeats", "seed")
    with own_server(args.bundle, [*options, "--no-prefix-cache"]) as url, Progress("bench") as bar:
        servers = {"medusa-deploy": Server(url)}
        if args.peer is not None:
            servers["peer"] = Server(args.peer, args.peer_model)
        named = {name: getattr(args, name) for name in names}
        report = serving_bench(session, servers, prompts, args.rates, progress=bar.update, **named)
    report = {"environment": facts, **report}
    if args.html is not None:
        write_whole(args.html, serving_page(report).encode())
    emit(describe_serving(report), report, args.json)
    return 0


def _tree(manifest: Manifest, name: str | None, seed: int) -> tuple[Tree | None, str]:
    """Read the tree asked for, and say what was cut from it to fit."""
    from ..tree_set import trees_for

    if name is None:
        return None, ""
    chosen = trees_for(manifest, [name], seed)
    [(key, tree)] = chosen.trees.items()
    return tree, chosen.notes.get(key, "")
