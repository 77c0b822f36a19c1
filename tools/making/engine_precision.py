"""Options of verbs that make the network of an engine: its precision, and what GPTQ rounds with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import positive_int

if TYPE_CHECKING:
    from ...export.quantise.blocks import GptqMoments
    from ...export.quantise.w8a8 import PrecisionOptions
    from ..console import Progress

PRECISIONS = ("fp16", "int8", "int4", "fp8")


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--precision`` and what belongs to precisions of few bits."""
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp16", help="of the layers' weights; fp8: sm_89 and newer (default: fp16)"
    )
    few = parser.add_argument_group("with --precision int8, int4 or fp8")
    few.add_argument(
        "--scales", type=Path, help="what calibrate wrote: int8 and fp8 have activations in 8 bits, int4 is smoothed"
    )
    few.add_argument(
        "--keep", type=_layers, metavar="LAYER,…", help="whose activations stay fp16 (default in int8: what it changes most)"
    )
    for name, what in (("projection", "onto the vocabulary"), ("heads", "of the heads")):
        few.add_argument(f"--{name}-precision", choices=PRECISIONS, help=f"weights {what} (default: same, int8 for int4 and fp8)")
    few.add_argument("--block", type=int, choices=(32, 64, 128), help="inputs that share a scale in int4 (default: 64)")
    few.add_argument(
        "--rounding", choices=("gptq", "nearest"), help="of int4 (default: gptq) and fp8 (default: nearest); gptq runs the model"
    )
    few.add_argument("--data", type=Path, metavar="FILE", help="texts for gptq (default: prompts of the package, answered)")
    few.add_argument("--samples", type=positive_int, metavar="N", help="of them (default: 48)")


def precision_options(args: argparse.Namespace) -> PrecisionOptions:
    """Return what the arguments say beside ``--precision``.

    Raises:
        UsageError: arguments that contradict each other.
    """
    from ...export.quantise.w8a8 import PrecisionOptions

    return PrecisionOptions(args.scales, args.keep, args.projection_precision, args.heads_precision, args.block)


def check_rounding(args: argparse.Namespace, options: PrecisionOptions) -> None:
    """Refuse options of rounding where nothing is in int4 or fp8.

    Raises:
        UsageError: names them.
    """
    from ...runtime.errors import UsageError

    given = [f"--{name}" for name in ("rounding", "data", "samples") if getattr(args, name) is not None]
    if given and not {"int4", "fp8"} & options.precisions(args.precision):
        raise UsageError(f"{', '.join(given)}: nothing is in int4 or fp8", hint="give --precision int4 or fp8")


def gptq_is_needed(args: argparse.Namespace, options: PrecisionOptions) -> bool:
    """True if GPTQ rounds something: int4 unless it is told not to, fp8 if it is told to."""
    precisions = options.precisions(args.precision)
    return args.rounding != "nearest" and ("int4" in precisions or ("fp8" in precisions and args.rounding == "gptq"))


def gptq_moments(args: argparse.Namespace, bundle: Path, options: PrecisionOptions, progress: Progress) -> GptqMoments | None:
    """Measure what GPTQ rounds with; None where it isn't needed.

    Raises:
        BundleError, CalibrationError, PromptError, MissingDependencyError: the bundle or the data won't do.
    """
    if not gptq_is_needed(args, options):
        return None
    from ...export.quantise.blocks import GptqMoments
    from ...runtime.files.bundle import open_bundle
    from ..extras import require
    from .moments import measure_moments

    require("calibrate")
    return GptqMoments(*measure_moments(open_bundle(bundle), args.data, args.samples, None, progress))


def _layers(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
