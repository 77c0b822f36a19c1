"""Build TensorRT engines into a bundle, ahead of time: one plan a target, with profiles for prefill, plain decoding and trees."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime import step_io
from ..runtime.bundle import Bundle, open_bundle, record_files, refuse_existing, staged_folder, write_manifest
from ..runtime.engine_record import RECORD_NAME, EngineRecord, Profile, Range, parse_engine_record
from ..runtime.errors import BundleBusyError, BundleError, UsageError
from ..runtime.manifest import Manifest
from .tensorrt import Advance, ParsedGraph, TensorRT

ENGINES = "engines"
PLAN, HEADS_PLAN = "step.plan", "heads.plan"
_TREE_ROWS = (8, 16, 32, 64)
_BEST_COLUMNS = 512

# By input: the axes whose sizes vary, in order; the others are fixed by the graph. Caches vary in B, carried rows in B and P.
_STEP_AXES = {
    step_io.TOKENS: "BN",
    step_io.POSITIONS: "BN",
    step_io.ANCESTORS: "BNN",
    step_io.FORCED: "B",
    step_io.WRITE_INDEX: "B",
    step_io.COLUMNS: "T",
    step_io.LOGIT_ROWS: "BR",
    step_io.KEPT: "B",
    step_io.KEPT_COUNT: "B",
    step_io.DRAFT_SLOTS: "BN",
}


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What a build would make: ``targets``, ``profiles``, and the bytes of weights that each plan holds."""

    backend: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    weights_bytes: int


def default_rows(manifest: Manifest) -> tuple[int, ...]:
    """Tree sizes that get a profile: plain decoding, the bundle's own tree, and the usual sizes that the bundle allows."""
    return tuple(sorted({1, manifest.tree().rows, *(rows for rows in _TREE_ROWS if rows <= manifest.limits.max_rows)}))


def profiles_for(manifest: Manifest, rows: Sequence[int], prefill: int | None = None) -> tuple[Profile, ...]:
    """One profile for prefill (slot by slot, logits of the last row), one for each number of rows.

    Raises:
        UsageError: a number of rows that the bundle doesn't allow.
    """
    limits = manifest.limits
    sizes = sorted(set(rows))
    if not sizes or sizes[0] < 1 or sizes[-1] > limits.max_rows:
        raise UsageError(f"rows {list(rows)}, the bundle allows 1 to {limits.max_rows}", hint="export with a larger --max-rows")
    chunk = limits.prefill_chunk if prefill is None else prefill
    if not limits.prefill_chunk <= chunk <= limits.capacity:
        raise UsageError(
            f"prefill of {chunk} rows, the bundle's sessions ask for {limits.prefill_chunk}",
            hint=f"from {limits.prefill_chunk} to the capacity of {limits.capacity}",
        )
    columns = (1, min(_BEST_COLUMNS, limits.cache_rows), limits.cache_rows)
    first = Profile("prefill", (1, chunk, chunk), (1, 1, 1), (1, 1, 1), columns, (1, 1, 1))
    slots = (1, 1, limits.batch)
    return (first, *(Profile(f"rows-{n}", (n, n, n), (n, n, n), slots, columns, (1, n, sizes[-1])) for n in sizes))


def plan_engines(
    bundle: Path | str, targets: Sequence[str], *, backend: str, rows: Sequence[int] | None = None, prefill: int | None = None
) -> EnginePlan:
    """Check what :func:`build_engines` would check before it builds, and say what it would build.

    Raises:
        BundleError, UsageError, MissingDependencyError: the bundle, a target or a size won't do.
    """
    return _plan(open_bundle(bundle, check_hashes=False), _backend_for(targets, backend), targets, rows, prefill)


def _backend_for(targets: Sequence[str], backend: str) -> TensorRT:
    tensorrt = TensorRT(backend)
    for target in targets:
        tensorrt.check_target(target)
    return tensorrt


def _plan(
    bundle: Bundle, tensorrt: TensorRT, targets: Sequence[str], rows: Sequence[int] | None, prefill: int | None
) -> EnginePlan:
    manifest = bundle.manifest
    if manifest.dtype != "float16":
        raise UsageError(f"the bundle's graph is {manifest.dtype}", hint="TensorRT engines are built of: export --dtype fp16")
    _graph(manifest)
    weights = sum(record.size for name, record in manifest.files.items() if name.endswith("weights.bin"))
    profiles = profiles_for(manifest, default_rows(manifest) if rows is None else rows, prefill)
    return EnginePlan(tensorrt.backend, tuple(dict.fromkeys(targets)), profiles, weights)


def build_engines(
    bundle: Path | str,
    targets: Sequence[str],
    *,
    backend: str = "tensorrt-rtx",
    rows: Sequence[int] | None = None,
    prefill: int | None = None,
    force: bool = False,
    resume: bool = False,
    report: Callable[[str], None] = lambda _phase: None,
    advance: Advance = lambda _done, _total, _phase: True,
) -> list[dict[str, Any]]:
    """Build an engine for each target into ``engines/<target>`` of the bundle and list it in the manifest.

    ``rows``: tree sizes with a profile of their own (None: :func:`default_rows`). ``resume``: engines that are there and
    were built from the same graph, by the same version, with the same profiles, stay. An interrupted build leaves the bundle
    as it was. Returns, for each target, its seconds (0 where it stayed) and bytes.

    Raises:
        BundleError: no bundle, or files that aren't its own.
        BundleExistsError: an engine is there, and neither ``force`` nor ``resume`` is given.
        BundleBusyError: another build is at work in this bundle.
        EngineError: TensorRT refused.
        UsageError, MissingDependencyError, OutputError: a target, a size, a package or the file system won't do.
    """
    tensorrt = _backend_for(targets, backend)
    reports = []
    with _locked(Path(bundle)):
        opened = open_bundle(bundle)
        plan = _plan(opened, tensorrt, targets, rows, prefill)
        for target in plan.targets:
            started = time.perf_counter()
            folder = opened.folder / ENGINES / target
            kept = resume and _is_current(opened, target, tensorrt, plan.profiles)
            if not kept:
                refuse_existing(folder, force=force or resume)
                opened = _build(opened, target, tensorrt, plan.profiles, report, advance)
            seconds = 0.0 if kept else time.perf_counter() - started
            size = sum(path.stat().st_size for path in folder.iterdir())
            reports.append({"target": target, "seconds": seconds, "bytes": size, "folder": str(folder), "kept": kept})
    return reports


def _build(
    bundle: Bundle,
    target: str,
    tensorrt: TensorRT,
    profiles: tuple[Profile, ...],
    report: Callable[[str], None],
    advance: Advance,
) -> Bundle:
    """Build one target and commit it. Returns the bundle as it is now."""
    manifest = bundle.manifest
    source = _graph(manifest)
    folder = bundle.folder / ENGINES / target
    report(f"{target}: parsing")
    step, heads = tensorrt.parse(bundle.path(source)), tensorrt.parse(bundle.path(manifest.heads_graph))
    for profile in profiles:
        step.add_profile(_step_shapes(step, profile))
    batch = (1, 1, manifest.limits.batch)
    hidden = manifest.backbone.hidden_size
    heads.add_profile({step_io.ROOT_HIDDEN: [batch, (hidden, hidden, hidden)], step_io.ROOT_TOKEN: [batch]})
    without = _without(manifest, target)
    with staged_folder(folder, force=True) as staging:
        report(f"{target}: building")
        step.build(target, staging / PLAN, advance)
        report(f"{target}: building the heads")
        heads.build(target, staging / HEADS_PLAN, advance)
        record = EngineRecord(
            backend=tensorrt.backend,
            backend_version=tensorrt.version,
            target=target,
            precision="fp16",
            weights="inside",
            plan=PLAN,
            heads_plan=HEADS_PLAN,
            graph_sha256=manifest.files[source].sha256,
            profiles=profiles,
            inputs=step.inputs,
            outputs=step.outputs,
            warnings=(*step.warnings, *heads.warnings),
        )
        (staging / RECORD_NAME).write_text(record.to_json(), "utf-8")
        report(f"{target}: hashing")
        built = record_files(staging)
        if without != manifest:
            # The manifest forgets an engine before it is replaced: at no moment does it list files that aren't its own.
            write_manifest(bundle.folder, without)
    base = f"{ENGINES}/{target}"
    files = {**without.files, **{f"{base}/{name}": entry for name, entry in built.items()}}
    complete = replace(without, files=files, engines={**without.engines, target: f"{base}/{RECORD_NAME}"})
    write_manifest(bundle.folder, complete)
    return replace(bundle, manifest=complete)


def _step_shapes(graph: ParsedGraph, profile: Profile) -> dict[str, list[Range]]:
    sizes = {"B": profile.slots, "N": profile.rows, "R": profile.logit_rows, "T": profile.columns}
    shapes = {}
    for tensor in graph.inputs:
        dynamic = _STEP_AXES.get(tensor.name, "B")
        fixed = [(size, size, size) for size in tensor.shape[len(dynamic) :]]
        shapes[tensor.name] = [*(sizes[axis] for axis in dynamic), *fixed]
        if tensor.name.startswith("carried_"):
            shapes[tensor.name][2] = profile.carried
    return shapes


def _graph(manifest: Manifest) -> str:
    """The file that engines are built of.

    Raises:
        UsageError: a bundle of an older program, without that graph.
    """
    try:
        return manifest.variants["device"]
    except KeyError:
        raise UsageError("the bundle has no graph for TensorRT", hint="export it again: it is of an older version") from None


def _without(manifest: Manifest, target: str) -> Manifest:
    prefix = f"{ENGINES}/{target}/"
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(prefix)}
    engines = {name: path for name, path in manifest.engines.items() if name != target}
    return replace(manifest, files=files, engines=engines)


def _is_current(bundle: Bundle, target: str, tensorrt: TensorRT, profiles: tuple[Profile, ...]) -> bool:
    """Whether the bundle has this very engine. Its files were checked when the bundle was opened."""
    name = bundle.manifest.engines.get(target)
    if name is None:
        return False
    try:
        record = parse_engine_record(bundle.path(name).read_bytes())
    except BundleError:
        return False
    graph = bundle.manifest.files[_graph(bundle.manifest)].sha256
    made = (record.backend, record.backend_version, record.graph_sha256, record.profiles)
    return made == (tensorrt.backend, tensorrt.version, graph, profiles)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds out of the bundle; a process that dies lets go."""
    if not folder.is_dir():  # open_bundle says what is wrong with it
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BundleBusyError(f"another build is at work in {folder}", hint="wait until it has ended") from None
        yield
    finally:
        os.close(handle)
