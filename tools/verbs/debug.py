"""``medusa-deploy debug``: a kit of polygraphy's commands for an engine that gives wrong tokens, and what it found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..console import add_json_argument, non_negative
from ..making.engine_precision import add_precision_arguments, check_rounding, gptq_moments, precision_options

HELP = "write a kit to debug an engine with polygraphy, or say which layer left first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="the bundle whose engine is looked into")
    parser.add_argument("--target", metavar="SM", help="GPU architecture of the engine, such as sm_89")
    parser.add_argument("-o", "--output", type=Path, metavar="KIT", help="folder to write")
    add_precision_arguments(parser)
    parser.add_argument("--prompt", help="whose steps are recorded (default: a short question)")
    parser.add_argument("--layers", action="store_true", help="expect the results of every product and attention, too")
    parser.add_argument("--force", action="store_true", help="replace the kit")
    parser.add_argument("--compare", type=Path, metavar="KIT", help="say which layer leaves first in what polygraphy saved")
    parser.add_argument("--tolerance", type=non_negative, help="largest relative error that is rounding (default: 0.05)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Write a kit, or compare one: then exit code 1 if a tensor leaves."""
    from ...runtime.errors import UsageError
    from ..console import emit

    if args.compare is not None:
        from ..debugging.comparison import TOLERANCE, compare_kit

        if args.bundle is not None or args.output is not None:
            raise UsageError("--compare takes a kit alone", hint="medusa-deploy debug --compare KIT")
        report = compare_kit(args.compare, TOLERANCE if args.tolerance is None else args.tolerance)
        emit(comparison_text(report), report, args.json)
        left = any(found["first"] is not None for runs in report["steps"].values() for found in runs.values())
        return 1 if left else 0
    if args.bundle is None or args.target is None or args.output is None:
        raise UsageError("a kit needs a bundle, a target and an output", hint="medusa-deploy debug BUNDLE --target sm_89 -o KIT")
    facts = _write(args)
    emit(kit_text(args.output, facts), {"kit": args.output, **facts}, args.json)
    return 0


def _write(args: argparse.Namespace) -> dict[str, Any]:
    from ...export.engines.options import check_format
    from ...runtime.files.bundle import open_bundle, refuse_existing
    from ..console import Progress
    from ..debugging.kit import write_kit
    from ..extras import require

    require("debug")
    options = precision_options(args)
    check_rounding(args, options)
    for precision in sorted(options.precisions(args.precision)):
        check_format(precision, args.target)
    refuse_existing(args.output, force=args.force)
    bundle = open_bundle(args.bundle)
    with Progress("starting") as progress:
        moments = gptq_moments(args, args.bundle, options, progress)
        return write_kit(
            bundle,
            args.output,
            target=args.target,
            precision=args.precision,
            options=options,
            moments=None if moments is None else moments.means,
            prompt=args.prompt,
            layers=args.layers,
            force=args.force,
            report=progress.phase,
        )


def kit_text(folder: Path, facts: dict[str, Any]) -> str:
    """Describe a kit and what to do with it."""
    from ..console import facts as lines

    described = {
        "kit": str(folder),
        "network": f"{facts['precision']} for {facts['target']}",
        "steps": ", ".join(facts["steps"]),
        "expected": f"{len(facts['marked'])} tensors" if facts["layers"] else "the graph's outputs",
    }
    then = f"on the machine with the GPU: cd {folder.name} && ./commands.sh\nthen: medusa-deploy debug --compare {folder}"
    return f"{lines(described)}\n\n{then}"


def comparison_text(report: dict[str, Any]) -> str:
    """Describe which tensor leaves first in each step."""
    from ..console import table

    rows = []
    for step, runs in report["steps"].items():
        for runner, found in runs.items():
            first, worst = found["first"], found["worst"][0] if found["worst"] else None
            where = f"{first['place']}: {first['tensor']} ({first['node']})" if first else "none"
            how = "NaN" if first and first["nan"] else f"{(first or worst or {'error': 0.0})['error']:.2g}"
            rows.append([step, runner, f"{found['leaving']} of {found['compared']}", where, how])
    text = table(rows, ["step", "runner", "leave", "first", "relative error"])
    return text if report["layers"] else f"{text}\n\nThe kit expects the graph's outputs alone: with --layers it names the layer."
