"""Measures what int8 needs of a bundle's activations and weights, and writes it as scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.arguments import flag, integer, number, optional_path, path, settings
from ...runtime.errors import UsageError

if TYPE_CHECKING:
    from ...calibration.int8.ranges import Method
    from ...runtime.files.bundle import Bundle
    from ...runtime.files.scales_file import Scales
    from ..console import Progress

DEFAULT_SAMPLES = 64
DEFAULT_NEW_TOKENS = 64


def calibrate(
    bundle: Path | str,
    output: Path | str,
    data: Path | str | None = None,
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

    ``data`` None takes the package's training prompts. ``samples`` None takes all of a file, and 64 of the package's.
    ``method`` None is ``max``. ``smooth`` is ``auto``, ``off`` or an alpha, as ``--smooth``.

    ``layer_by_layer`` loads one layer at a time, and no prompt is answered; None does so where all weights together would take
    more than half of the memory available. Otherwise ``max_new_tokens``, 64 by default, follow each prompt. ``OUTPUT.progress``
    keeps what was seen until the scales are written: an interrupted run goes on from it.

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

    bundle, output, data = path("bundle", bundle), path("output", output), optional_path("data", data)
    method, smooth = settings("method", method, Method), "auto" if smooth is None else smooth
    samples = integer("samples", samples, DEFAULT_SAMPLES if data is None else None)
    max_new_tokens, threads = integer("max_new_tokens", max_new_tokens, None), integer("threads", threads, None)
    layer_by_layer = None if layer_by_layer is None else flag("layer_by_layer", layer_by_layer)
    alphas = ALPHAS if smooth == "auto" else () if smooth == "off" else (number("smooth", smooth, 0.0, 0, 1),)
    smooth = smooth if isinstance(smooth, str) else float(smooth)
    refuse_existing(output, force=flag("force", force))
    progress_file = output.with_name(f"{output.name}.progress")
    with Progress("load") as bar:
        opened = open_bundle(bundle)
        reason = _why_layer_by_layer(opened, layer_by_layer)
        if reason is not None and max_new_tokens is not None:
            raise UsageError(
                f"layer by layer ({reason}) no prompt is answered, and {max_new_tokens} new tokens are asked for",
                hint="leave --max-new-tokens out, or give --no-layer-by-layer where memory suffices",
            )
        smoothing = {"smooth": smooth, "alphas": list(alphas)}
        way = _Way(data or packaged_prompts("train"), samples, alphas, smoothing, method, threads)
        if reason is None:
            scales = _with_answers(opened, way, max_new_tokens or DEFAULT_NEW_TOKENS, progress_file, bar)
        else:
            scales = _in_layers(opened, way, reason, progress_file, bar)
        write_whole(output, scales.to_json().encode())
    progress_file.unlink(missing_ok=True)
    return scales


@dataclass(frozen=True, slots=True)
class _Way:
    """Settings that both ways of calibrating take."""

    path: Path
    count: int | None
    alphas: Sequence[float | None]
    settings: Mapping[str, Any]
    method: Method
    threads: int | None


def _with_answers(bundle: Bundle, way: _Way, max_new_tokens: int, progress_file: Path, bar: Progress) -> Scales:
    """Calibrate with the whole graph in memory, on prompts and their answers."""
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
    """Calibrate with one layer in memory at a time, on prompts alone."""
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
    """Reason to load one layer at a time; None where all are loaded."""
    from ...calibration.int8.matmuls import StepGraph
    from ..console import human_bytes
    from ..machine import memory_bytes

    if asked is not None:
        return "as asked" if asked else None
    weights, (_, available) = StepGraph(bundle).weights_bytes(), memory_bytes()
    if not available or 2 * weights <= available:
        return None
    return f"its weights, {human_bytes(weights)} in float32, take more than half of the memory available"
