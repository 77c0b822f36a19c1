"""``medusa-deploy verify``: speculative decoding against plain decoding of the same bundle, token for token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "compare speculative with plain decoding, token for token, over many trees"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, positive_int
    from ..engine_options import add_engine_arguments
    from ..prompt_source import add_prompt_arguments

    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens per prompt (default: %(default)s)")
    parser.add_argument(
        "--trees",
        default="",
        metavar="A,B,…",
        help="root, chain, published, narrow, wide, random, the bundle's, JSON files of choices, or best-rows: rows chosen in "
        "each step, a fixed number of them and as many as pay (default: all but files)",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="also compare with transformers' greedy generate of this model, as export takes it"
    )
    parser.add_argument(
        "--sampled", action="store_true", help="also compare sampled tokens, plain and speculative, for equal seeds"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest rounding noise, as a share of the largest logit (default: by the graph's types)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random tree, random prompts and sampling (default: %(default)s)"
    )
    add_engine_arguments(parser)
    parser.add_argument(
        "--slots",
        type=positive_int,
        default=1,
        metavar="N",
        help="also decode all prompts together, N at a time, and compare each with its run alone",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Verify and print the tables. Returns 1 when a divergence is unexplained. The file of ``--json`` grows with every prompt."""
    from ...runtime.sampling import SamplingParams
    from ..console import STDOUT, Progress, emit, write_json
    from ..engine_options import load_session
    from ..environment import environment
    from ..exactness.verify import BEST_ROWS, describe, verify
    from ..prompt_source import prompts_for
    from ..tree_set import TreeSet, trees_for

    session = load_session(args, slots=args.slots)
    names = [name for name in args.trees.split(",") if name]
    best_rows = BEST_ROWS in names or not names
    fixed = [name for name in names if name != BEST_ROWS]
    chosen = trees_for(session.manifest, fixed, args.seed) if fixed or not names else TreeSet()
    prompts = prompts_for(session, args.prompts, args.count, args.seed)
    reference = None
    if args.reference is not None:
        from ..exactness.reference import load_reference

        with Progress("loading the reference") as bar:
            reference = load_reference(args.reference, session.manifest.dtype, bar)
    options: dict[str, Any] = {"trees": chosen.trees, "best_rows": best_rows}
    options |= {"max_new_tokens": args.max_new_tokens, "tolerance": args.tolerance}
    machine = environment(session) | {"backend": args.backend}

    def save(part: dict[str, Any]) -> None:
        if args.json not in (None, STDOUT):
            write_json({"complete": False, "environment": machine, **part}, args.json)

    together = (1 + 2 * best_rows) * (args.slots > 1)
    runs = len(prompts) * (1 + len(chosen.trees) + 2 * best_rows + together)
    with Progress("verify", runs + len(prompts) * (reference is not None)) as bar:
        report = verify(session, prompts, reference=reference, progress=bar.update, save=save, **options)
        if args.sampled:
            bar.phase("verify sampled", runs)
            sample = SamplingParams(mode="sample", seed=args.seed)
            greedy = report
            report["sampled"] = verify(
                session,
                prompts,
                sample=sample,
                progress=bar.update,
                save=lambda part: save({**greedy, "sampled": part}),
                **options,
            )
            report["unexplained"] += report["sampled"]["unexplained"]
    report = {"complete": True, "environment": machine, **report, "notes": chosen.notes, "skipped": chosen.skipped}
    emit(describe(report), report, args.json)
    return 1 if report["unexplained"] else 0
