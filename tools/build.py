"""``medusa-deploy build``: TensorRT engines for a bundle, ahead of time and, with TensorRT-RTX, without the GPU."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import add_json_argument, positive_int

if TYPE_CHECKING:
    from ..export.engine import EnginePlan

HELP = "build TensorRT engines into a bundle, one plan a GPU architecture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that export wrote, in fp16")
    parser.add_argument(
        "--target", required=True, type=_names, metavar="SM,…", help="GPU architectures such as sm_86,sm_89, or here for this GPU"
    )
    parser.add_argument(
        "--backend", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx", help="default: tensorrt-rtx, needs no GPU here"
    )
    parser.add_argument(
        "--rows", type=_numbers, metavar="N,…", help="step sizes that get a profile (default: 1, the tree's, 8, 16, 32, 64)"
    )
    parser.add_argument("--prefill", type=positive_int, metavar="N", help="prompt rows a step at most (default: the bundle's)")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--force", action="store_true", help="replace engines that are there")
    known.add_argument("--resume", action="store_true", help="keep engines that are up to date, replace the others")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built; build nothing")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from ..export.engine import build_engines, plan_engines
    from .console import Progress, emit, human_bytes, human_seconds, table

    options = {name: getattr(args, name) for name in ("backend", "rows", "prefill")}
    if args.dry_run:
        plan = plan_engines(args.bundle, args.target, **options)
        emit(plan_text(plan), {"bundle": args.bundle, "dry_run": True, **asdict(plan)}, args.json)
        return 0
    with Progress("starting") as progress:

        def advance(done: int, total: int, phase: str) -> bool:
            progress.update(done, phase, total)
            return True

        built = build_engines(
            args.bundle, args.target, **options, force=args.force, resume=args.resume, report=progress, advance=advance
        )
    rows = [
        [entry["target"], human_bytes(entry["bytes"]), "up to date" if entry["kept"] else human_seconds(entry["seconds"]),
         entry["folder"]]
        for entry in built
    ]  # fmt: skip
    report: dict[str, Any] = {"bundle": args.bundle, "backend": args.backend, "engines": built}
    emit(table(rows, ["target", "size", "time", "folder"]), report, args.json)
    return 0


def plan_text(plan: EnginePlan) -> str:
    """What would be built, for a person."""
    from .console import facts, human_bytes, table

    rows = [
        [profile.name, *(_range(size) for size in (profile.rows, profile.logit_rows, profile.slots, profile.columns))]
        for profile in plan.profiles
    ]
    summary = {
        "backend": plan.backend,
        "would build": ", ".join(plan.targets),
        "size of each": f"about {human_bytes(plan.weights_bytes)}: the weights are inside",
    }
    return f"{facts(summary)}\n\n{table(rows, ['profile', 'rows', 'with logits', 'slots', 'visible cache rows'])}"


def _range(size: tuple[int, int, int]) -> str:
    smallest, best, largest = size
    return str(best) if smallest == largest else f"{smallest} … {largest}, best {best}"


def _names(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no target")
    return names


def _numbers(text: str) -> list[int]:
    return [positive_int(number) for number in text.split(",")]
