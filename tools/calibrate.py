"""``medusa-deploy calibrate``: what int8 needs to know of a bundle's activations and weights, measured while it answers."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..calibration.ranges import Method
    from ..runtime.scales_file import Scales

HELP = "measure ranges of activations and weights on the CPU and write int8 scales"
METHODS = ("max", "percentile", "mse", "entropy")
DEFAULT_SAMPLES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    from .console import add_json_argument, positive_int

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
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="per prompt (default: %(default)s)")
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
    from .extras import require

    require("calibrate")
    from ..calibration.ranges import Method
    from .console import emit

    method = Method(args.method, args.percentile)
    scales = calibrate(
        args.bundle,
        args.output,
        args.data,
        method,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        smooth=args.smooth,
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


def calibrate(
    bundle: Path,
    output: Path,
    data: Path | None = None,
    method: Method | None = None,
    *,
    samples: int | None = None,
    max_new_tokens: int = 64,
    smooth: str | float = "auto",
    threads: int | None = None,
    force: bool = False,
) -> Scales:
    """Measure a bundle on ``data`` and write its scales to ``output``, whole or not at all.

    ``data`` None takes the package's training prompts; ``samples`` None takes all of a file and 64 of those. ``method`` None is
    ``max``. ``smooth``: ``auto``, ``off`` or an alpha, as ``--smooth``. What was seen is kept in ``OUTPUT.progress`` until the
    scales are written: an interrupted run goes on from it.

    Raises:
        BundleError, BundleSchemaError, BundleIntegrityError: the bundle can't be used.
        BundleExistsError: the output exists and ``force`` is false.
        CalibrationError, PromptError, CapacityError: too little data, or data that the bundle can't take.
        RangeError, QuantisationError: values that no scale fits.
        OutputError: the file system refused.
    """
    from ..calibration.collect import Calibrator
    from ..calibration.ranges import Method
    from ..calibration.row_sample import find_smoothing
    from ..calibration.samples import read_samples
    from ..calibration.scales import check_enough, make_scales
    from ..calibration.smoothing import ALPHAS
    from ..runtime.bundle import open_bundle, refuse_existing, write_whole
    from .console import Progress
    from .prompt_source import check_room, packaged_prompts

    refuse_existing(output, force=force)
    with Progress("load") as bar:
        calibrator = Calibrator(open_bundle(bundle), threads)
        path, count = (packaged_prompts("train"), samples or DEFAULT_SAMPLES) if data is None else (data, samples)
        prompts = read_samples(calibrator.session, path, count, max_new_tokens)
        check_room(calibrator.session, prompts, max_new_tokens)
        bar.phase("observe", len(prompts))
        progress_file = output.with_name(f"{output.name}.progress")
        seen = calibrator.collect(prompts, max_new_tokens, progress_file, bar.update)
        check_enough(seen)
        alphas = ALPHAS if smooth == "auto" else () if smooth == "off" else (float(smooth),)
        bar.phase("smooth")
        smoothing = find_smoothing(calibrator, seen, prompts, max_new_tokens, alphas, bar.update)
        bar.phase("scales")
        settings = {**calibrator.settings(prompts, max_new_tokens), "smooth": smooth, "alphas": list(alphas)}
        scales = make_scales(calibrator, seen, method or Method(), settings, smoothing)
        write_whole(output, scales.to_json().encode())
    progress_file.unlink(missing_ok=True)
    return scales


def worst(scales: Scales, count: int = 10) -> list[dict[str, object]]:
    """The activations that lose the largest shares of their values to 0, with one of the layers that read them."""
    readers = {layer.activation: name for name, layer in reversed(list(scales.layers.items()))}
    order = sorted(scales.activations.items(), key=lambda item: -item[1].zeroed)[:count]
    return [
        {
            "activation": name,
            "layer": readers[name],
            "largest": entry.largest,
            "scale": entry.scale,
            "clipped": entry.clipped,
            "zeroed": entry.zeroed,
            "relative_error": entry.relative_error,
        }
        for name, entry in order
    ]


def smoothed(scales: Scales) -> dict[str, dict[str, object]]:
    """By grid: how many activations have which alpha, and the mean errors of their products without factors and with them."""
    from ..runtime.scales_file import GRIDS

    result: dict[str, dict[str, object]] = {}
    for grid in GRIDS if scales.smoothing else ():
        entries = [grids[grid] for grids in scales.smoothing.values()]
        counts = Counter("off" if entry.alpha is None else f"{entry.alpha:g}" for entry in entries)
        before, after = (fmean(getattr(entry, name) for entry in entries) for name in ("unsmoothed_error", "error"))
        result[grid] = {"activations": dict(sorted(counts.items())), "unsmoothed_error": before, "error": after}
    return result


def describe(scales: Scales) -> str:
    """Counts, and the worst activations, one a line."""
    from .console import table

    facts = scales.provenance
    headline = (
        f"{len(scales.activations)} activations of {len(scales.layers)} layers, method {scales.method}, from "
        f"{facts['prompts']} prompts: {facts['prefill_rows']} prefill rows and {facts['tree_rows']} tree rows"
    )
    rows = [
        [
            entry["activation"],
            entry["layer"],
            entry["largest"],
            entry["scale"],
            f"{entry['clipped']:.3%}",
            f"{entry['zeroed']:.1%}",
            f"{entry['relative_error']:.1%}",
        ]
        for entry in worst(scales)
    ]
    shown = f"{headline}\n\n{table(rows, ['activation', 'read by', 'largest', 'scale', 'clipped', 'zeroed', 'rms error'])}"
    for grid, entry in smoothed(scales).items():
        counts = ", ".join(f"{count} of alpha {alpha}" for alpha, count in entry["activations"].items())  # type: ignore[attr-defined]
        shown += (
            f"\n\nsmoothing, {grid} grid: {counts}\n"
            f"mean squared error of their products {entry['unsmoothed_error']:.2e} without, {entry['error']:.2e} with"
        )
    return shown
