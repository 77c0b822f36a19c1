"""``medusa-deploy build``: TensorRT engines for a bundle, ahead of time and, with TensorRT-RTX, without the GPU."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import add_json_argument, positive_int
from ..making.engine_precision import (
    add_precision_arguments,
    check_rounding,
    gptq_is_needed,
    gptq_moments,
    precision_options,
)

if TYPE_CHECKING:
    from ...export.engines.options import EngineOptions, EnginePlan
    from ...export.estimate import ExportPlan

HELP = "build TensorRT engines into a bundle, one plan a GPU architecture"
_FEATURES = {
    "hardware-compatible": "plans that also run on other GPUs from sm_80 on (tensorrt)",
    "version-compatible": "plans that also run with later versions of TensorRT's lean runtime (tensorrt)",
    "weight-streaming": "plans whose weights may stay on the host when they run",
    "refittable": "plans whose weights can be replaced (tensorrt-rtx: with --target here only)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "bundle", metavar="BUNDLE|MODEL", help="folder that export wrote in fp16; or a model as export takes it, exported first"
    )
    parser.add_argument(
        "--target", required=True, type=_names, metavar="SM,…", help="GPU architectures such as sm_86,sm_89, or here for this GPU"
    )
    add_precision_arguments(parser)
    parser.add_argument(
        "--backend",
        choices=("tensorrt-rtx", "tensorrt"),
        default="tensorrt-rtx",
        help="default: tensorrt-rtx, which needs no GPU here; tensorrt: never run",
    )
    parser.add_argument("--weights", choices=("inside", "streamed"), default="inside", help="in the plan, or inputs of it")
    parser.add_argument(
        "--rows", type=_numbers, metavar="N,…", help="step sizes that get a profile (default: 1, the tree's, 8, 16, 32, 64)"
    )
    parser.add_argument("--prefill", type=positive_int, metavar="N", help="prompt rows a step at most (default: the bundle's)")
    model = parser.add_argument_group("when given a MODEL")
    model.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="bundle to export to")
    model.add_argument("--heads", metavar="HEADS", help="Medusa heads (default: none, it decodes plainly)")
    model.add_argument("--capacity", type=positive_int, help="tokens a slot holds (default: 2048)")
    model.add_argument("--batch", type=positive_int, help="slots at most (default: 1)")
    features = parser.add_argument_group("what the builder may be asked for, refused where the backend hasn't got it")
    features.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and write kernel timings (tensorrt)")
    for name, meaning in _FEATURES.items():
        features.add_argument(f"--{name}", action="store_true", help=meaning)
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--force", action="store_true", help="replace engines that are there")
    known.add_argument("--resume", action="store_true", help="keep engines that are up to date, replace the others")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built; build nothing")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Build the engines, or say what would be built."""
    from ...export.engines.build import build_engines, check_engines, plan_engines
    from ...export.engines.options import EngineOptions
    from ..console import Progress, emit, warn

    options = EngineOptions(
        **{name: getattr(args, name) for name in ("backend", "precision", "weights", "rows", "prefill", "timing_cache")},
        quantised=precision_options(args),
        features=tuple(name for name in _FEATURES if getattr(args, name.replace("-", "_"))),
    )
    model = _model_options(args)
    if args.dry_run:
        if model is None:
            plan = plan_engines(args.bundle, args.target, options)
            emit(plan_text(plan), {"bundle": args.bundle, "dry_run": True, **asdict(plan)}, args.json)
        else:
            _dry_run_of_model(args, options, model)
        return 0
    bundle = args.bundle
    with Progress("starting") as progress:
        if model is not None:
            _check_before_export(args, options)
            bundle = args.output
            _export(args, model, progress)
        check_rounding(args, options.quantised)
        if gptq_is_needed(args, options.quantised):
            check_engines(args.target, options)
            plan_engines(bundle, args.target, options)
        moments = gptq_moments(args, bundle, options.quantised, progress)
        shown = _Shown(progress)
        known = {"force": args.force, "resume": args.resume}
        built = build_engines(
            bundle, args.target, options, moments=moments, **known, report=shown.report, advance=shown.advance
        )
    warn(dict.fromkeys(warning for entry in built for warning in entry["record"].warnings if _is_news(warning)))
    emit(report_text(built), {"bundle": bundle, "backend": args.backend, "engines": built}, args.json)
    return 0


# -- a checkpoint instead of a bundle ------------------------------------------------------------------------------


def _model_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """Options of the export that a checkpoint needs; None for a bundle.

    Raises:
        UsageError: options that belong to the other of the two.
    """
    from ...runtime.errors import UsageError

    given = {name: getattr(args, name) for name in ("heads", "capacity", "batch", "output") if getattr(args, name) is not None}
    source = Path(args.bundle)
    is_model = source.suffix.lower() == ".gguf" or (source / "config.json").is_file()
    if not is_model and args.output is not None:  # without it, a bundle was meant
        from ...export.hub import hub_name

        is_model = hub_name(args.bundle) is not None
    if (source / "manifest.json").is_file() or not is_model:
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise UsageError(f"{names}: {args.bundle} isn't a checkpoint", hint="these belong to the export of a MODEL")
        return None
    if args.scales is not None:
        raise UsageError(f"{args.bundle} is a checkpoint, and scales are of a bundle", hint="export it, calibrate, then build")
    if args.output is None:
        raise UsageError(f"{args.bundle} is a checkpoint, which is exported first", hint="name the bundle to write: -o BUNDLE")
    return {"dtype": "fp16", **{name: given[name] for name in ("capacity", "batch") if name in given}}


def _check_before_export(args: argparse.Namespace, options: EngineOptions) -> None:
    """Refuse a wrong target or feature now, before minutes of export."""
    from ...export.engines.build import check_engines
    from ...runtime.files.bundle import refuse_existing
    from ..extras import quiet_libraries, require

    require("export")
    check_engines(args.target, options)
    quiet_libraries()
    refuse_existing(args.output, force=args.force)


def _export(args: argparse.Namespace, model: dict[str, Any], report: Callable[[str], None]) -> None:
    from ...export.exporter import export_bundle
    from ..console import warn

    exported = export_bundle(args.bundle, args.heads, args.output, **model, force=args.force, report=report)
    warn(exported["warnings"])


def _dry_run_of_model(args: argparse.Namespace, options: EngineOptions, model: dict[str, Any]) -> None:
    from ...export.estimate import plan_export
    from ..console import emit

    _check_before_export(args, options)
    plan = plan_export(args.bundle, args.heads, **model)
    report = {"model": args.bundle, "bundle": args.output, "dry_run": True, "export": asdict(plan), "options": asdict(options)}
    emit(model_plan_text(plan, args.output, args.target, options), {**report, "targets": args.target}, args.json)


# -- what is shown -------------------------------------------------------------------------------------------------


class _Shown:
    """Shows phase, profile and remaining time of a build on the progress line."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self.report("starting")

    def report(self, phase: str) -> None:
        """Begin a new piece of work."""
        self._progress.phase(phase)
        self._started = time.monotonic()
        self._done, self._changed = 0, self._started

    def advance(self, phase: str, done: int, total: int) -> bool:
        """Estimate the remaining time: a profile takes as long as the one before. The builder says nothing in between."""
        from ..console import human_seconds

        now = time.monotonic()
        if done != self._done:
            self._done, self._changed = done, now
        parts = []
        if total > 1:
            parts.append(f"profile {min(done + 1, total)} of {total}")
        if 0 < done < total:
            remaining = (self._changed - self._started) * (total - done) / done - (now - self._changed)
            parts.append(f"ETA {human_seconds(max(0.0, remaining))}")
        else:
            parts.append(human_seconds(now - self._started))
        self._progress.update(0, "  ".join([*parts, phase.lower()]))
        return True


def report_text(built: list[dict[str, Any]]) -> str:
    """Describe what was built."""
    from ..console import human_bytes, human_seconds, table

    rows = []
    for entry in built:
        logs = entry["record"].logs.values()
        peak = max((log.peak_rss_bytes for log in logs), default=0)
        took = "up to date" if entry["kept"] else human_seconds(entry["seconds"])
        sizes = human_bytes(entry["bytes"]), took, human_bytes(peak)
        rows.append([entry["target"], entry["record"].precision, *sizes, entry["folder"]])
    kernels = [f"{entry['target']}: {_kernels(entry['record'])}" for entry in built]
    return "\n".join([table(rows, ["target", "precision", "size", "time", "peak memory", "folder"]), "", *kernels])


def _kernels(record: Any) -> str:
    """Say what the step's plan holds: the products that occur most, and its constants by type."""
    from ..console import human_bytes

    log = record.logs[record.plan]
    products = [f"{count} {name}" for name, count in log.kernels.items() if name.startswith("product") or name.endswith("Fc")]
    constants = [f"{human_bytes(size)} {kind}" for kind, size in log.constants.items() if size >= 1 << 16]
    return f"{', '.join(products[:4]) or 'no product is named'}; stored: {', '.join(constants) or 'nothing large'}"


def plan_text(plan: EnginePlan) -> str:
    """Describe what would be built."""
    from ..console import facts, human_bytes, table

    rows = [
        [profile.name, *(_range(size) for size in (profile.rows, profile.logit_rows, profile.slots, profile.columns))]
        for profile in plan.profiles
    ]
    summary = {
        "backend": f"{plan.backend} {plan.backend_version}",
        "would build": ", ".join(plan.targets),
        "precision": f"{plan.precision}{', '.join(['', *(f'{name} {value}' for name, value in plan.quantised.items())])}",
        "features": ", ".join(plan.features) or "none asked for",
        "the backend has": ", ".join(plan.available),
        "weights": f"{human_bytes(plan.weights_bytes)} in each target's plans; kernels come on top",
    }
    return f"{facts(summary)}\n\n{table(rows, ['profile', 'rows', 'with logits', 'slots', 'visible cache rows'])}"


def model_plan_text(plan: ExportPlan, output: Path, targets: list[str], options: EngineOptions) -> str:
    """Describe what would be exported and then built."""
    from ..console import facts, human_bytes

    return facts(
        {
            "would export": f"{plan.architecture}, {plan.parameters:,} parameters, in fp16",
            "to": f"{output}: about {human_bytes(plan.bundle_bytes)}",
            "would build": f"{', '.join(targets)}, {options.precision}, with {options.backend}",
        }
    )


def _is_news(warning: str) -> bool:
    # The parser says of every int64 input and output that it is one; heads of the paper's form don't read the root token.
    return not re.search(r"has Int64 binding|Unused Input: root|Input Tensor root is unused", warning)


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
