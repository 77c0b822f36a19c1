"""Turns a checkpoint and heads into a bundle: trace, lower, check, commit."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import __version__
from ..runtime.arguments import flag, path
from ..runtime.errors import UnlinkableError
from ..runtime.executors import step_io
from ..runtime.executors.executor import CacheLayout
from ..runtime.files.adapter_file import Adapter
from ..runtime.files.bundle import record_files, refuse_existing, sha256, staged_folder
from ..runtime.files.heads import HeadSet, PlattScaling
from ..runtime.files.manifest import MANIFEST_NAME, HeadFacts, Limits, Manifest, TextFacts
from ..runtime.tree import Tree
from .backbone.backbone import load_backbone
from .backbone.linked import LinkedWeights, load_linked_backbone, prune_projection
from .backbone.record import Backbone
from .backbone.tokenizer import write_text_files
from .estimate import (
    DEFAULT_TREE,
    by_size,
    check_before_weights,
    checked_choices,
    checked_limit,
    find_sources,
    identity_config,
    tree_rows,
)
from .graphs import HEADS_GRAPH, write_graphs
from .heads.layouts import ReadHeads, read_heads
from .heads.linked import LinkedHeads, link_heads
from .heads.module import HeadStack
from .hub import Fetched
from .passes.matmuls import plain_step_bytes
from .proof.check import CheckReport
from .proof.linked_check import check_linked, check_variants
from .quantise.screen import Rounded

Report = Callable[[str], None]
ONNX = "onnx"
_NUMPY_DTYPES = {"fp32": "float32", "fp16": "float16"}


def export_bundle(
    model: Path | str | None,
    heads: Path | str | None,
    output: Path | str,
    *,
    dtype: str = "fp32",
    weights: str = "auto",
    capacity: int = 2048,
    batch: int = 1,
    tree: Tree | None = None,
    top_k: int = 10,
    max_rows: int = 64,
    prefill_chunk: int = 256,
    force: bool = False,
    report: Report = lambda phase: None,
) -> dict[str, Any]:
    """Write a bundle and return what was measured on the way.

    ``model`` and ``heads``: a path, or a name on a hub (:mod:`.hub`). Without ``model`` it is the backbone that the heads name.
    ``heads``: a file or folder in any layout of :mod:`.heads.layouts`; None exports the backbone alone, which decodes plainly.
    An adapter that the heads were trained with is merged into the backbone.
    ``weights``: ``linked``, ``copied``, or ``auto``, which copies backbones of up to 1 GiB and links larger ones where it can.
    Linked weights are safetensors: the checkpoint's own become files of the bundle (hard links where the file system has
    them), others are converted to such files. They are never in memory as a whole. Copied weights are. An adapter and what
    transformers converts while loading need them.
    ``capacity``: tokens a slot holds, prompt and answer together. ``batch``: slots at most. ``report`` receives each phase.

    Raises:
        DownloadError: a name on a hub that can't be fetched.
        CheckpointError, UnsupportedArchitectureError: the backbone can't be loaded or expressed.
        HeadsError, HeadsMismatchError, TreeError: heads or tree don't fit.
        TraceError: a library failed on the backbone's modules.
        ExportMismatchError: the graph doesn't reproduce the torch module; no bundle is written.
        BundleExistsError, OutputError: the output can't be written.
    """
    output = path("output", output)
    dtype, weights = checked_choices(dtype, weights, tree)
    limits_given = {"capacity": (capacity, 2048), "batch": (batch, 1), "top_k": (top_k, 10)}
    limits_given |= {"max_rows": (max_rows, 64), "prefill_chunk": (prefill_chunk, 256)}
    capacity, batch, top_k, max_rows, prefill_chunk = (
        checked_limit(name, value, default) for name, (value, default) in limits_given.items()
    )
    force = flag("force", force)
    refuse_existing(output, force=force)
    model_from, heads_from, notes = find_sources(model, heads, report)
    started = time.perf_counter()
    with staged_folder(output, force=force) as staging, ThreadPoolExecutor(1) as beside:
        folder = staging / ONNX
        folder.mkdir()
        read = None if heads_from is None else read_heads(heads_from.path)
        adapter = None if read is None else read.adapter
        empty, _, trees = check_before_weights(model_from.path, read, weights, capacity, tree, top_k)
        report("loading the backbone" if adapter is None else "loading the backbone and merging its adapter")
        weights = by_size(empty, dtype) if weights == "auto" else weights
        backbone = _load(model_from.path, dtype, capacity, weights, adapter, folder, report)
        linked = isinstance(backbone.weights, LinkedWeights)
        # Hashing the 13 GB of a 7B takes a tenth of the time of the rest, and the rest keeps one processor busy.
        hashes = {path: beside.submit(sha256, path) for path in folder.glob("*.safetensors")}
        text, warnings = write_text_files(model_from.path, backbone.module.config, staging)
        placed = _place_heads(backbone, read, folder)
        # Nobody holds the matrices of large heads any more.
        head_set, read = placed.heads, None if read is None else replace(read, heads=placed.heads)
        warnings += [*notes, *backbone.warnings, *(() if read is None else read.warnings)]
        max_rows = tree_rows(max_rows, trees, head_set.config.num_heads)
        projection = backbone.module.get_output_embeddings()
        stack = HeadStack(head_set, projection, top_k, backbone.dtype, backbone.logits, placed.places)
        rows = step_io.cache_rows(capacity, head_set.config.num_heads, max_rows)
        report("tracing")
        screened: Rounded = {}
        graphs = write_graphs(backbone, stack, rows, capacity, folder, report, screened=screened)
        scaling = () if read is None else read.platt_scaling
        manifest = _manifest(backbone, head_set, scaling, top_k, text, graphs, _NUMPY_DTYPES[dtype])
        limits = Limits(capacity, rows, max_rows, batch, min(prefill_chunk, capacity))
        shape = backbone.shape
        places: dict[str, Any] = {}
        layout = CacheLayout(shape.layers, 1, shape.kv_heads, rows, shape.head_dim, _NUMPY_DTYPES[dtype])
        if linked:
            checks, places = check_linked(folder, graphs, layout, capacity, backbone, stack, report, screened)
        else:
            sizes = (stack.config.num_heads, top_k, shape.hidden_size, shape.vocab_size)
            checks = check_variants(folder, graphs, layout, capacity, sizes, backbone, stack, report)
        warnings += _missed(checks)
        report("hashing")
        known = {path: future.result() for path, future in hashes.items()}
        provenance = {
            "created_by": f"medusa-deploy {__version__}",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
            "check": {name: asdict(check) for name, check in checks.items()},
            "model": model_from.origin,
            "plain_step_bytes": plain_step_bytes(ir.load(folder / graphs["cpu"])),
            "weights": {"kind": "linked" if linked else "copied", **places},
            "warnings": warnings,
            "heads": None if read is None else {"layout": read.layout, **read.measured, **_origin(heads_from)},
            "adapter": None if adapter is None else {"files": dict(adapter.files), **asdict(adapter.shape)},
        }
        complete = Manifest(
            **{**manifest, "limits": limits, "files": record_files(staging, known), "provenance": provenance},
            trees={name: each.choices() for name, each in trees.items()},
            default_tree=DEFAULT_TREE,
        )
        (staging / MANIFEST_NAME).write_text(complete.to_json(), "utf-8")
    measured = {name: provenance[name] for name in ("check", "weights", "warnings", "adapter")}
    return {"seconds": time.perf_counter() - started, **measured}


def _origin(fetched: Fetched | None) -> dict[str, Any]:
    return {} if fetched is None or fetched.origin is None else {"origin": fetched.origin}


def _load(
    model: Path, dtype: str, capacity: int, weights: str, adapter: Adapter | None, folder: Path, report: Report
) -> Backbone:
    """Load a backbone with its weights linked from ``folder``, or copied where that was asked for or nothing else works."""
    if weights == "linked" or (weights == "auto" and adapter is None):
        try:
            return load_linked_backbone(model, dtype, capacity, folder, report)
        except UnlinkableError:
            if weights == "linked":
                raise
    return load_backbone(model, dtype, capacity, adapter)


def _place_heads(backbone: Backbone, read: ReadHeads | None, folder: Path) -> LinkedHeads:
    """Choose the heads of an export, and put large ones of a linked backbone into a file of ``folder``."""
    heads = prune_projection(backbone, identity_heads(backbone) if read is None else read.heads)
    linked = isinstance(backbone.weights, LinkedWeights)
    return link_heads(heads, backbone.dtype, folder) if linked else LinkedHeads(heads, {})


def identity_heads(backbone: Backbone) -> HeadSet:
    """Make one head that repeats the backbone's own prediction, for a backbone that is exported alone."""
    hidden = backbone.shape.hidden_size
    zeros = np.zeros((hidden, hidden), np.float32)
    tensors = {"head.0.layer.0.weight": zeros, "head.0.layer.0.bias": zeros[0]}
    return HeadSet(identity_config(backbone.shape), tensors)


def _manifest(
    backbone: Backbone,
    heads: HeadSet,
    scaling: PlattScaling,
    top_k: int,
    text: TextFacts,
    graphs: dict[str, str],
    dtype: str,
) -> dict[str, Any]:
    shape, config = backbone.shape, heads.config
    return {
        "backbone": shape,
        "heads": HeadFacts(
            config.kind, config.num_heads, top_k, config.projection, config.draft_vocab_size or shape.vocab_size, scaling
        ),
        "text": text,
        "dtype": dtype,
        "variants": {name: f"{ONNX}/{file}" for name, file in graphs.items()},
        "heads_graph": f"{ONNX}/{HEADS_GRAPH}",
    }


def _missed(checks: dict[str, CheckReport]) -> list[str]:
    """Warn of windows that the check was too short for."""
    missed = sorted({window for check in checks.values() for window in check.missed})
    return [
        f"the check was shorter than the window of {window} tokens, because it would have taken too long: what lies beyond the "
        "window wasn't compared"
        for window in missed
    ]
