"""Builds TensorRT engines into a bundle, ahead of time: one plan a target, with profiles for prefill, plain steps and trees."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import __version__
from ...runtime.arguments import flag, path, settings, strings
from ...runtime.errors import BundleError
from ...runtime.files.bundle import (
    Bundle,
    locked,
    open_bundle,
    output_error,
    record_files,
    refuse_existing,
    staged_folder,
    write_manifest,
)
from ...runtime.files.engine_record import RECORD_NAME, EngineRecord, parse_engine_record
from ...runtime.files.manifest import Manifest
from ...runtime.files.plan_file import Compression
from ...runtime.files.weight_inputs import WeightInput
from ..quantise.blocks import GptqMoments, Moments
from ..quantise.w8a8 import PrecisionOptions
from .builder_process import Advance, BuildRequest, BuiltPlan, build_plan
from .features import CROSS_BUILD, has
from .gpu import resolve_target
from .network import VARIANT, NetworkSource, network_source, place_weights, source_files
from .options import EngineOptions, EnginePlan, check_targets, plan_for, step_axes, step_sizes
from .plan_packing import pack_plan
from .tensorrt import TensorRT

ENGINES = "engines"
PLAN, HEADS_PLAN = "step.plan", "heads.plan"
_SCRATCH = ".network.partial-"


@dataclass(frozen=True, slots=True)
class _Job:
    """Holds what all targets of one call share."""

    tensorrt: TensorRT
    plan: EnginePlan
    quantised: PrecisionOptions
    moments: Mapping[str, Moments] | None
    timing_cache: Path | None
    sources: dict[str, str]
    report: Callable[[str], None]
    advance: Advance


def check_engines(targets: Sequence[str], options: EngineOptions) -> None:
    """Check what can be known of a build before there is a bundle.

    Raises:
        UsageError, MissingDependencyError: a target, a feature or a package won't do.
    """
    targets, options = strings("targets", targets), settings("options", options, EngineOptions)
    check_targets(TensorRT(options.backend), targets, options)


def plan_engines(bundle: Path | str, targets: Sequence[str], options: EngineOptions | None = None) -> EnginePlan:
    """Check what :func:`build_engines` checks before it builds, and return what it would build.

    Raises:
        BundleError, UsageError, MissingDependencyError: the bundle, a target or a size won't do.
    """
    targets, options = strings("targets", targets), settings("options", options, EngineOptions)
    tensorrt = TensorRT(options.backend)
    return plan_for(open_bundle(bundle, check_hashes=False), tensorrt, targets, options)


def build_engines(
    bundle: Path | str,
    targets: Sequence[str],
    options: EngineOptions | None = None,
    *,
    moments: GptqMoments | None = None,
    force: bool = False,
    resume: bool = False,
    report: Callable[[str], None] = lambda _phase: None,
    advance: Advance = lambda _phase, _done, _total: True,
) -> list[dict[str, Any]]:
    """Build an engine for each target into ``engines/<target>`` of the bundle and list it in the manifest.

    ``moments``: for GPTQ of int4 and fp8 weights; None rounds to the nearest. ``resume``: keep the engines that were built from
    the same files, by the same version, with the same options. An interrupted build leaves the bundle as it was. What a killed
    one leaves on disk, the next removes. Returns seconds (0 for an engine that was kept), bytes and the record of each target.

    Raises:
        BundleError: no bundle, or files that aren't its own.
        BundleExistsError: an engine is there, and neither ``force`` nor ``resume`` is given.
        BundleBusyError: another build is at work in this bundle.
        EngineError: TensorRT refused, or died; EngineMemoryError where memory ran out.
        QuantisationError: a weight can't be stored in few bits.
        UsageError, MissingDependencyError, OutputError: a target, a size, a package or the file system won't do.
    """
    bundle, targets = path("bundle", bundle), strings("targets", targets)
    options = settings("options", options, EngineOptions)
    force, resume = flag("force", force), flag("resume", resume)
    tensorrt = TensorRT(options.backend)
    reports = []
    with locked(bundle), ExitStack() as stack:
        opened = open_bundle(bundle)
        plan = plan_for(opened, tensorrt, targets, options)
        plan = replace(plan, targets=_resolved(tensorrt, plan), quantised={**plan.quantised, **_rounding(options, moments)})
        means = None if moments is None else moments.means
        job = _Job(tensorrt, plan, options.quantised, means, options.timing_cache, source_files(opened), report, advance)
        engines = opened.folder / ENGINES
        _remove_leftovers(engines)
        stack.callback(_remove_empty, engines)
        current = {target: _current_record(opened, target, job) if resume else None for target in plan.targets}
        for target in plan.targets:
            if current[target] is None:
                refuse_existing(engines / target, force=force or resume)
        source: NetworkSource | None = None
        for target in plan.targets:
            started, record = time.perf_counter(), current[target]
            if record is None:
                source = source or stack.enter_context(_source(opened, job))
                opened, record = _build(opened, target, source, job)
            kept = current[target] is not None
            seconds = 0.0 if kept else time.perf_counter() - started
            folder = engines / target
            size = sum(path.stat().st_size for path in folder.iterdir())
            reports.append(
                {"target": target, "seconds": seconds, "bytes": size, "folder": str(folder), "kept": kept, "record": record}
            )
    return reports


def _rounding(options: EngineOptions, moments: GptqMoments | None) -> dict[str, object]:
    precisions = options.quantised.precisions(options.precision)
    if moments is None:
        return {"rounding": "nearest"} if "int4" in precisions else {}
    return {"rounding": "gptq", "data_sha256": moments.data_sha256} if {"int4", "fp8"} & precisions else {}


def _resolved(tensorrt: TensorRT, plan: EnginePlan) -> tuple[str, ...]:
    targets = tuple(dict.fromkeys(resolve_target(target) for target in plan.targets))
    if has(plan.backend, CROSS_BUILD):
        for target in targets:
            tensorrt.check_target(target)
    return targets


@contextmanager
def _source(bundle: Bundle, job: _Job) -> Iterator[NetworkSource]:
    """Provide the ONNX files to parse. Files that had to be made are gone when the block ends."""
    engines = bundle.folder / ENGINES
    try:
        engines.mkdir(exist_ok=True)
        # Beside the plans rather than in the system's folder, which may be memory: an int8 network is as large as a plan.
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=engines))
    except OSError as error:
        raise output_error(engines, error) from error
    try:
        with ExitStack() as stack:
            try:
                job.report(f"preparing the {job.plan.precision} network")
                made = network_source(bundle, job.plan.precision, job.plan.weights, scratch, job.quantised, job.moments)
                source = stack.enter_context(made)
            except OSError as error:
                raise output_error(engines, error) from error
            yield source
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(bundle: Bundle, target: str, source: NetworkSource, job: _Job) -> tuple[Bundle, EngineRecord]:
    """Build one target and commit it. Returns the bundle as it is now, and the engine's record."""
    manifest = bundle.manifest
    folder = bundle.folder / ENGINES / target
    without = _without(manifest, target)
    with staged_folder(folder, force=True) as staging:
        request = partial(
            BuildRequest,
            job.tensorrt.backend,
            target,
            features=job.plan.features,
            timing_cache=None if job.timing_cache is None else str(job.timing_cache.absolute()),
        )
        job.report(f"{target}: building")
        fixed = {weight.name: "." for weight in source.weight_inputs}
        axes = step_axes(manifest.backbone.layers) | fixed
        sizes = tuple(step_sizes(profile) for profile in job.plan.profiles)
        step = build_plan(request(_absolute(source.step), _absolute(staging / PLAN), axes, sizes), job.advance)
        job.report(f"{target}: building the heads")
        slots = ({"B": (1, 1, manifest.limits.batch)},)
        heads = build_plan(request(_absolute(source.heads), _absolute(staging / HEADS_PLAN), fixed, slots), job.advance)
        plans, compression = _packed(staging, job)
        inputs = place_weights(source, staging, f"{ENGINES}/{target}")
        record = _record(manifest, target, step, heads, job, inputs, plans, compression)
        (staging / RECORD_NAME).write_text(record.to_json(), "utf-8")
        job.report(f"{target}: hashing")
        built = record_files(staging)
        if without != manifest:
            # The manifest forgets an engine before it is replaced: at no moment does it list files that aren't its own.
            write_manifest(bundle.folder, without)
    base = f"{ENGINES}/{target}"
    files = {**without.files, **{f"{base}/{name}": entry for name, entry in built.items()}}
    complete = replace(without, files=files, engines={**without.engines, target: f"{base}/{RECORD_NAME}"})
    write_manifest(bundle.folder, complete)
    return replace(bundle, manifest=complete), record


def _packed(folder: Path, job: _Job) -> tuple[tuple[str, str], dict[str, Compression]]:
    """Compress the step's and the heads' plan if they hold no weights. Returns their names, and how each is compressed."""
    names, compression = [], {}
    for name in (PLAN, HEADS_PLAN):
        path, how = folder / name, None
        if job.plan.weights == "streamed":
            job.report(f"compressing {name}")
            path, how = pack_plan(path)
        names.append(path.name)
        if how is not None:
            compression[path.name] = how
    return (names[0], names[1]), compression


def _record(
    manifest: Manifest,
    target: str,
    step: BuiltPlan,
    heads: BuiltPlan,
    job: _Job,
    weight_inputs: tuple[WeightInput, ...],
    plans: tuple[str, str],
    compression: dict[str, Compression],
) -> EngineRecord:
    plan = job.plan
    return EngineRecord(
        backend=plan.backend,
        backend_version=plan.backend_version,
        target=target,
        precision=plan.precision,
        quantised=plan.quantised,
        weights=plan.weights,
        plan=plans[0],
        heads_plan=plans[1],
        graph_sha256=manifest.files[manifest.variants[VARIANT]].sha256,
        profiles=plan.profiles,
        inputs=step.inputs,
        outputs=step.outputs,
        warnings=(*step.warnings, *heads.warnings),
        variant=VARIANT,
        features=plan.features,
        sources=job.sources,
        versions={"medusa-deploy": __version__, **{name: importlib.metadata.version(name) for name in ("numpy", "onnx-ir")}},
        logs={plans[0]: step.log, plans[1]: heads.log},
        weight_inputs=weight_inputs,
        compression=compression,
    )


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _without(manifest: Manifest, target: str) -> Manifest:
    prefix = f"{ENGINES}/{target}/"
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(prefix)}
    engines = {name: path for name, path in manifest.engines.items() if name != target}
    return replace(manifest, files=files, engines=engines)


def _current_record(bundle: Bundle, target: str, job: _Job) -> EngineRecord | None:
    """Read the record of this very engine, if the bundle has it. Opening the bundle checked its files."""
    name = bundle.manifest.engines.get(target)
    if name is None:
        return None
    try:
        record = parse_engine_record(bundle.path(name).read_bytes())
    except BundleError:
        return None
    plan = job.plan
    same = ("backend", "backend_version", "precision", "quantised", "weights", "features", "profiles")
    is_current = all(getattr(record, name) == getattr(plan, name) for name in same) and record.sources == job.sources
    return record if is_current else None


def _remove_leftovers(engines: Path) -> None:
    """Remove what a killed build has left. The lock is held: nobody is at work here."""
    for leftover in (*engines.glob(".*.partial-*"), *engines.glob(".*.replaced")):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove_empty(engines: Path) -> None:
    if engines.is_dir() and not any(engines.iterdir()):
        engines.rmdir()
