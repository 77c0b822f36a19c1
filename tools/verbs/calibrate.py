"""``medusa-deploy calibrate``: what int8 needs to know of a bundle's activations and weights, measured while it answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UsageError

if TYPE_CHECKING:
    from ...calibration.int8.ranges import Method
    from ...runtime.files.bundle import Bundle
    from ...runtime.files.scales_file import Scales
    from ..console import Progress

HELP = "measure ranges of activations and weights on the CPU and write int8 scales"
METHODS = ("max", "percentile", "mse", "entropy")
DEFAULT_SAMPLES = 64
DEFAULT_NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
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
    from ..calibrate_report import describe, smoothed, worst
    from ..console import emit

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


def calibrate(
    bundle: Path,
    output: Path,
    data: Path | None = None,
    method: Method | None = None,
    *,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    smooth: str | float = "auto",
    layer_by_layer: bool | None = None,
    threads: int | None = None,
    force: bool = False,
) -> Scales:
    """Measure a bundle on ``data`` and write its scales to ``output``, whole or not at all.

    ``data`` None takes the package's training prompts; ``samples`` None takes all of a file and 64 of those. ``method`` None is
    ``max``. ``smooth``: ``auto``, ``off`` or an alpha, as ``--smooth``. ``layer_by_layer`` loads one layer at a time, and no
    prompt is answered; None does so where all weights together would take more than half of the memory available. Otherwise
    ``max_new_tokens``, 64 by default, follow each prompt. What was seen is kept in ``OUTPUT.progress`` until the scales are
    written: an interrupted run goes on from it.

    Raises:
        UsageError: ``max_new_tokens`` are given, layer by layer.
        BundleError, BundleSchemaError, BundleIntegrityError: the bundle can't be used.
        BundleExistsError: the output exists and ``force`` is false.
        CalibrationError, PromptError, CapacityError: too little data, or data that the bundle can't take.
        RangeError, QuantisationError: values that no scale fits.
        OutputError: the file system refused.
    """
    from ...calibration.int8.ranges import Method
    from ...calibration.int8.smoothing import ALPHAS
    from ...runtime.files.bundle import open_bundle, refuse_existing, write_whole
    from ..console import Progress
    from ..prompt_source import packaged_prompts

    refuse_existing(output, force=force)
    path, count = (packaged_prompts("train"), samples or DEFAULT_SAMPLES) if data is None else (data, samples)
    alphas = ALPHAS if smooth == "auto" else () if smooth == "off" else (float(smooth),)
    progress_file = output.with_name(f"{output.name}.progress")
    with Progress("load") as bar:
        opened = open_bundle(bundle)
        reason = _why_layer_by_layer(opened, layer_by_layer)
        if reason is not None and max_new_tokens is not None:
            raise UsageError(
                f"layer by layer ({reason}) no prompt is answered, and {max_new_tokens} new tokens are asked for",
                hint="leave --max-new-tokens out, or give --no-layer-by-layer where memory suffices",
            )
        way = _Way(path, count, alphas, {"smooth": smooth, "alphas": list(alphas)}, method or Method(), threads)
        if reason is None:
            scales = _with_answers(opened, way, max_new_tokens or DEFAULT_NEW_TOKENS, progress_file, bar)
        else:
            scales = _in_layers(opened, way, reason, progress_file, bar)
        write_whole(output, scales.to_json().encode())
    progress_file.unlink(missing_ok=True)
    return scales


@dataclass(frozen=True, slots=True)
class _Way:
    """What both ways of calibrating take."""

    path: Path
    count: int | None
    alphas: Sequence[float | None]
    settings: Mapping[str, Any]
    method: Method
    threads: int | None


def _with_answers(bundle: Bundle, way: _Way, max_new_tokens: int, progress_file: Path, bar: Progress) -> Scales:
    """The whole graph in memory, and answers."""
    from ...calibration.int8.collect import Calibrator
    from ...calibration.int8.row_sample import find_smoothing
    from ...calibration.int8.samples import read_samples
    from ...calibration.int8.scales import check_enough, make_scales
    from ..prompt_source import check_room

    calibrator = Calibrator(bundle, way.threads)
    prompts = read_samples(calibrator.session, way.path, way.count, max_new_tokens)
    check_room(calibrator.session, prompts, max_new_tokens)
    bar.phase("observe", len(prompts))
    seen = calibrator.collect(prompts, max_new_tokens, progress_file, bar.update)
    check_enough(seen)
    bar.phase("smooth")
    smoothing = find_smoothing(calibrator, seen, prompts, max_new_tokens, way.alphas, bar.update)
    bar.phase("scales")
    settings = {**calibrator.settings(prompts, max_new_tokens), **way.settings}
    return make_scales(calibrator, seen, way.method, settings, smoothing)


def _in_layers(bundle: Bundle, way: _Way, reason: str, progress_file: Path, bar: Progress) -> Scales:
    """One layer in memory at a time, no answers."""
    from ...calibration.int8.layer_by_layer import LayerCalibrator
    from ...calibration.int8.samples import read_samples
    from ...calibration.int8.scales import check_rows, make_scales

    calibrator = LayerCalibrator(bundle, way.threads)
    prompts = read_samples(calibrator, way.path, way.count, 0)
    texts = [prompt[: calibrator.longest] for prompt in prompts]
    check_rows(sum(map(len, texts)))
    bar.phase("layers", len(calibrator.stages))
    found = calibrator.measure(texts, way.alphas, progress_file, bar.update)
    bar.phase("scales")
    cut = sum(len(prompt) > calibrator.longest for prompt in prompts)
    settings = {**calibrator.settings(texts), "why_layer_by_layer": reason, "cut_texts": cut, **way.settings}
    return make_scales(calibrator, found.seen, way.method, settings, found.smoothing, found.weights, steps=False)


def _why_layer_by_layer(bundle: Bundle, asked: bool | None) -> str | None:
    """Why one layer is loaded at a time; None where all are."""
    from ...calibration.int8.matmuls import StepGraph
    from ..console import human_bytes
    from ..machine import memory_bytes

    if asked is not None:
        return "as asked" if asked else None
    weights, (_, available) = StepGraph(bundle).weights_bytes(), memory_bytes()
    if not available or 2 * weights <= available:
        return None
    return f"its weights, {human_bytes(weights)} in float32, take more than half of the memory available"
