"""Exports a checkpoint in 8 or 4 bits: no step holds the model in memory, and no float32 copy of it stays on disk."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ...runtime.arguments import choice, flag, integer, optional_path, path
from ...runtime.errors import UsageError
from .scales import DEFAULT_SAMPLES, calibrate
from .variant import ROUNDINGS, describe_variant

PRECISIONS = {"int8": 8, "int4": 4}


def export_few_bits(
    model: Path | str | None,
    heads: Path | str | None,
    output: Path | str,
    precision: str,
    *,
    data: Path | str | None = None,
    samples: int | None = None,
    rounding: str = "gptq",
    threads: int | None = None,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export ``model`` with ``heads``, calibrate it layer by layer, and write a bundle of the quantised CPU graph alone.

    ``precision``: ``int8`` or ``int4``, of the layers' weights; the projection and the heads get 8 bits. ``data``, ``samples``:
    prompts to calibrate with, as :func:`.scales.calibrate`. ``rounding`` of 4-bit weights: ``gptq`` or ``nearest``.
    ``options``: those of :func:`...export.exporter.export_bundle`. While it works, the disk holds the weights in float32, too.
    Returns the export's report with what was quantised.

    Raises:
        UsageError: another precision, or ``dtype`` other than fp32.
        CalibrationError, RangeError, QuantisationError: too little data, or values that can't be quantised.
        Those of :func:`...export.exporter.export_bundle`.
    """
    from ..extras import require

    require("export")
    require("calibrate")
    from ...calibration.int8.layer_by_layer import LayerCalibrator
    from ...calibration.int8.samples import read_samples
    from ...export.exporter import export_bundle
    from ...export.passes.matmuls import find_matmuls
    from ...export.quantise.cpu import CpuPrecision, CpuReport
    from ...export.quantise.few_bits import write_few_bits
    from ...export.quantise.screen import load_whole
    from ...runtime.files.bundle import open_bundle, refuse_existing, staged_folder
    from ...runtime.files.scales_file import read_scales
    from ..console import Progress
    from ..prompt_source import packaged_prompts

    output, data, force = path("output", output), optional_path("data", data), flag("force", force)
    precision = choice("precision", precision, tuple(PRECISIONS), "int8")
    rounding = choice("rounding", rounding, ROUNDINGS, "gptq")
    samples, threads = integer("samples", samples, DEFAULT_SAMPLES if data is None else None), integer("threads", threads, None)
    if options.get("dtype") not in (None, "fp32"):
        raise UsageError(
            f"{precision} of {options['dtype']}: the CPU's kernels for few bits take float32", hint="leave --dtype out"
        )
    refuse_existing(output, force=force)
    started, bits = time.perf_counter(), PRECISIONS[precision]
    wanted = CpuPrecision(layers=bits)
    with staged_folder(output, force=force) as staging:
        source, made = staging / "source", staging / "made"
        with Progress("starting") as bar:
            exported = export_bundle(model, heads, source, **options, report=bar)
        scales = source / "scales.json"
        calibrate(source, scales, data, samples=samples, layer_by_layer=True, threads=threads)
        opened = open_bundle(source, check_hashes=False)
        found = read_scales(scales, opened.manifest)
        scales.unlink()
        with Progress("quantise") as bar:
            moments = None
            if bits == 4 and rounding == "gptq":
                calibrator = LayerCalibrator(opened, threads)
                prompts = read_samples(calibrator, data or packaged_prompts("train"), samples, 0)
                moments = calibrator.moments([prompt[: calibrator.longest] for prompt in prompts])
            bar.phase("quantise", len(find_matmuls(load_whole(opened.path(opened.manifest.graph("cpu"))))))
            facts: dict[str, Any] = {}

            def describe(report: CpuReport, done: CpuPrecision) -> dict[str, Any]:
                facts.update(scales=dict(found.provenance), rounding=rounding, **describe_variant(report, done))
                return facts

            write_few_bits(opened, made, f"cpu-{precision}", wanted, found, moments, describe, bar.update)
            bar.phase("remove the float32 weights")
            shutil.rmtree(source)
            for part in made.iterdir():
                part.replace(staging / part.name)
            made.rmdir()
    return {**exported, "precision": precision, "quantised": facts, "seconds": time.perf_counter() - started}
