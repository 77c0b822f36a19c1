"""Adds a variant of the step graph, made from one that a bundle has, to the same bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import onnx_ir as ir

from ..runtime.errors import BundleExistsError, UsageError
from ..runtime.executors import step_io
from ..runtime.files.bundle import Bundle, record_files, sha256, staged_folder, write_manifest, write_whole
from ..runtime.files.manifest import FileRecord, Manifest, packed_twin
from .passes.pack import write_packed
from .weights import WeightsFile

PREFIX = "cpu-"
_NAME = re.compile(rf"{PREFIX}[a-z0-9][a-z0-9-]{{0,31}}")
_WEIGHTS = "weights.bin"


def check_variant(manifest: Manifest, name: str, *, force: bool) -> None:
    """Check that a variant of this name may be added.

    Raises:
        UsageError: the name breaks the pattern.
        BundleExistsError: the bundle has it, and ``force`` is false.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        hint = f"{PREFIX} and then letters, digits and hyphens, like {PREFIX}int8"
        raise UsageError(f"a variant can't be called {name!r}", hint=hint)
    if name in manifest.variants and not force:
        raise BundleExistsError(f"the bundle has a variant {name}", hint="give another name, or --force to replace it")


def add_variant(bundle: Bundle, name: str, model: ir.Model, provenance: Mapping[str, Any]) -> Bundle:
    """Write ``model`` as the variant ``name``, list it in the manifest, and return the new bundle.

    Tensors that lie in the bundle's files stay there. The other tensors go to a folder of the variant's own. The caller holds
    the bundle's lock and has called :func:`check_variant`. The manifest drops a variant before its files are replaced and lists
    the new one last, so that it never lists a file that doesn't match.

    Raises:
        OutputError: the file system refused. The bundle is unchanged, except that a variant to be replaced may be gone.
    """
    onnx = bundle.path(bundle.manifest.variants["cpu"]).parent
    folder, graph = onnx / name, onnx / f"step.{name}.onnx"
    without = _without(bundle.manifest, name)
    with staged_folder(folder, force=True) as staging:
        shadow = staging / "graph"  # stands for the graph's own folder, so that its relative paths are right
        (shadow / name).mkdir(parents=True)
        with WeightsFile(shadow / name / _WEIGHTS) as weights:
            weights.save(model, shadow / graph.name)
        written = (shadow / graph.name).read_bytes()
        (shadow / name / _WEIGHTS).replace(staging / _WEIGHTS)
        shutil.rmtree(shadow)
        built = record_files(staging)
        if without != bundle.manifest:
            write_manifest(bundle.folder, without)
    write_whole(graph, written)
    packed = write_packed(graph)
    base = PurePosixPath(bundle.manifest.variants["cpu"]).parent
    files = {
        **without.files,
        **{(base / name / file).as_posix(): record for file, record in built.items()},
        **{(base / file.name).as_posix(): FileRecord(file.stat().st_size, sha256(file)) for file in (graph, *packed)},
    }
    complete = replace(
        without,
        files=files,
        variants={**without.variants, name: (base / graph.name).as_posix()},
        provenance={**without.provenance, "quantised": {**without.provenance.get("quantised", {}), name: dict(provenance)}},
    )
    write_manifest(bundle.folder, complete)
    return replace(bundle, manifest=complete)


def _without(manifest: Manifest, name: str) -> Manifest:
    graph = manifest.variants.get(name)
    if graph is None:
        return manifest
    own = f"{PurePosixPath(graph).parent.as_posix()}/{name}/"
    graphs = {graph, *(packed_twin(graph, slots) for slots in step_io.PACKED_SLOTS)}
    return replace(
        manifest,
        files={path: record for path, record in manifest.files.items() if path not in graphs and not path.startswith(own)},
        variants={other: path for other, path in manifest.variants.items() if other != name},
        provenance={
            **manifest.provenance,
            "quantised": {other: facts for other, facts in manifest.provenance.get("quantised", {}).items() if other != name},
        },
    )
