"""``medusa-deploy calibrate``: int8 scales from a bundle's activations and weights, measured while it answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..making.scales import DEFAULT_NEW_TOKENS, DEFAULT_SAMPLES

HELP = "measure ranges of activations and weights on the CPU and write int8 scales"
METHODS = ("max", "percentile", "mse", "entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, positive_int

    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="prompts as JSON lines (.jsonl), or plain text (default: the package's training prompts, which are chats)",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        metavar="N",
        help=f"use the first N prompts or paragraphs (default: all of FILE, or {DEFAULT_SAMPLES} of the package's)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        metavar="N",
        help=f"per prompt (default: {DEFAULT_NEW_TOKENS}; none layer by layer)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="SCALES", help="file of scales to write")
    parser.add_argument("--method", choices=METHODS, default="max", help="how ranges are chosen (default: %(default)s)")
    parser.add_argument(
        "--percentile", type=float, default=99.99, metavar="P", help="for that method: of the magnitudes (default: %(default)s)"
    )
    parser.add_argument(
        "--smooth",
        type=_smooth,
        default="auto",
        metavar="auto|off|A",
        help="SmoothQuant's factors: an alpha an activation by search, none, or one alpha A in 0 … 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--layer-by-layer",
        action=argparse.BooleanOptionalAction,
        help="load one layer at a time: prompts are read, not answered (default: where all weights take over half of the memory)",
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="engine threads (default: all cores)")
    parser.add_argument("--force", action="store_true", help="replace SCALES")
    add_json_argument(parser)


def _smooth(text: str) -> str | float:
    if text in ("auto", "off"):
        return text
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, off nor a number in 0 … 1")
    return alpha


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the scales and print the activations that int8 suits least."""
    from ..extras import require

    require("calibrate")
    from ...calibration.int8.ranges import Method
    from ..console import emit
    from ..making.scales import calibrate
    from ..making.scales_report import describe, smoothed, worst

    method = Method(args.method, args.percentile)
    scales = calibrate(
        args.bundle,
        args.output,
        args.data,
        method,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        smooth=args.smooth,
        layer_by_layer=args.layer_by_layer,
        threads=args.threads,
        force=args.force,
    )
    report = {
        "output": args.output,
        "method": scales.method,
        "provenance": scales.provenance,
        "activations": worst(scales),
        "smoothing": smoothed(scales),
    }
    emit(f"{describe(scales)}\n\n{args.output}", report, args.json)
    return 0
