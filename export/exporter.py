"""Checkpoint and heads to bundle: trace, lower, check, commit."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import __version__
from ..runtime import step_io
from ..runtime.bundle import record_files, staged_folder
from ..runtime.draft import PlattScaling
from ..runtime.errors import UsageError
from ..runtime.executor import CacheLayout
from ..runtime.heads import HeadConfig, HeadSet
from ..runtime.manifest import MANIFEST_NAME, BackboneFacts, HeadFacts, Limits, Manifest, TextFacts
from ..runtime.ort import OrtExecutor, OrtModel
from ..runtime.tree import Tree
from .backbone import DTYPES, Backbone, load_backbone
from .check import CheckReport, check_executor, observe
from .head_layouts import check_fit, read_heads
from .heads import HeadStack
from .linked import first_layers, load_linked_backbone, prune_projection
from .linked_check import PROMPT_ROWS, FrugalExecutor, check_places, compare_all
from .lower import lower_cpu, lower_standard
from .plan import DEFAULT_TREE, bundle_trees, tree_rows
from .tokenizer import write_text_files
from .trace import trace_heads, trace_step
from .weights import WeightsFile

Report = Callable[[str], None]
WEIGHTS = ("copied", "linked")
_NUMPY_DTYPES = {"fp32": "float32", "fp16": "float16"}


def export_bundle(
    model: Path | str,
    heads: Path | str | None,
    output: Path | str,
    *,
    dtype: str = "fp32",
    weights: str = "copied",
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

    ``heads``: a file or folder in any layout of :mod:`.head_layouts`; None exports the backbone alone (it decodes plainly).
    ``weights``: ``copied`` into the bundle in the layout that engines like best, or ``linked``: the checkpoint's own safetensors
    become files of the bundle (hard links where the file system has them) and are never in memory as a whole.
    ``capacity``: tokens a slot holds, prompt and answer together. ``batch``: slots at most. ``report`` is told each phase.

    Raises:
        CheckpointError, UnsupportedArchitectureError: the backbone can't be loaded or expressed.
        HeadsError, HeadsMismatchError, TreeError: heads or tree don't fit.
        ExportMismatchError: the graph doesn't reproduce the torch module; no bundle is written.
        BundleExistsError, OutputError: the output can't be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
    if min(capacity, batch, top_k, max_rows, prefill_chunk) < 1:
        raise UsageError("capacity, batch, top-k, max-rows and prefill-chunk must be at least 1")
    started = time.perf_counter()
    with staged_folder(Path(output), force=force) as staging:
        folder = staging / "onnx"
        folder.mkdir()
        report("loading the backbone")
        if weights == "linked":
            backbone = load_linked_backbone(Path(model), dtype, capacity, folder, report)
        else:
            backbone = load_backbone(Path(model), dtype, capacity)
        read = None if heads is None else read_heads(heads)
        head_set = identity_heads(backbone) if read is None else read.heads
        check_fit(head_set, hidden_size=backbone.shape.hidden_size, vocab_size=backbone.shape.vocab_size, top_k=top_k)
        head_set = prune_projection(backbone, head_set)
        warnings = [] if read is None else list(read.warnings)
        trees = bundle_trees(tree, read, head_set.config.num_heads, top_k)
        max_rows = tree_rows(max_rows, trees, head_set.config.num_heads)
        stack = HeadStack(head_set, backbone.module.get_output_embeddings(), top_k, backbone.dtype)
        rows = step_io.cache_rows(capacity, head_set.config.num_heads, max_rows)
        report("tracing")
        variants = _write_graphs(backbone, stack, rows, folder, report)
        text = write_text_files(backbone, staging)
        scaling = () if read is None else read.platt_scaling
        manifest = _manifest(backbone, head_set, scaling, top_k, text, variants, _NUMPY_DTYPES[dtype])
        limits = Limits(capacity, rows, max_rows, batch, min(prefill_chunk, capacity))
        if backbone.linked is None:
            checks, places = _check(staging, manifest, limits, backbone, stack, report), None
        else:
            checks, places = _check_linked(staging, manifest, limits, backbone, stack, report)
        report("hashing")
        provenance = {
            "created_by": f"medusa-deploy {__version__}",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")},
            "check": {name: asdict(check) for name, check in checks.items()},
            "weights": {"kind": weights} if places is None else {"kind": weights, **places},
            "warnings": warnings,
            "heads": None if read is None else {"layout": read.layout, **read.measured},
        }
        complete = Manifest(
            **{**manifest, "limits": limits, "files": record_files(staging), "provenance": provenance},
            trees={name: each.choices() for name, each in trees.items()},
            default_tree=DEFAULT_TREE,
        )
        (staging / MANIFEST_NAME).write_text(complete.to_json(), "utf-8")
    measured = {name: provenance[name] for name in ("check", "weights", "warnings")}
    return {"seconds": time.perf_counter() - started, **measured}


def identity_heads(backbone: Backbone) -> HeadSet:
    """One head that repeats the backbone's own prediction: stands in where a backbone is exported alone."""
    hidden = backbone.shape.hidden_size
    zeros = np.zeros((hidden, hidden), np.float32)
    tensors = {"head.0.layer.0.weight": zeros, "head.0.layer.0.bias": zeros[0]}
    return HeadSet(HeadConfig("medusa", 1, 1, hidden, backbone.shape.vocab_size, "shared"), tensors)


def _write_graphs(
    backbone: Backbone, stack: HeadStack, rows: int, folder: Path, report: Report, prefix: str = ""
) -> dict[str, str]:
    traced = _trace(backbone, lambda: trace_step(backbone, stack, rows))
    for_cpu = traced.clone()
    lower_standard(traced)
    lower_cpu(for_cpu)
    report("writing graphs")
    with WeightsFile(folder / f"{prefix}weights.bin") as weights:
        weights.save(traced, folder / f"{prefix}step.onnx")
        weights.save(for_cpu, folder / f"{prefix}step.cpu.onnx")
        weights.save(_trace(backbone, lambda: trace_heads(backbone, stack)), folder / f"{prefix}heads.onnx")
    return {"standard": f"onnx/{prefix}step.onnx", "cpu": f"onnx/{prefix}step.cpu.onnx"}


def _trace(backbone: Backbone, trace: Callable[[], ir.Model]) -> ir.Model:
    """Trace with whatever stands in for the weights, and point to the real ones."""
    if backbone.linked is None:
        return trace()
    with backbone.linked.mode:
        model = trace()
    backbone.linked.attach(model, backbone.module)
    return model


def _manifest(
    backbone: Backbone,
    heads: HeadSet,
    scaling: PlattScaling,
    top_k: int,
    text: TextFacts,
    variants: dict[str, str],
    dtype: str,
) -> dict[str, Any]:
    shape, config = backbone.shape, heads.config
    return {
        "backbone": BackboneFacts(
            shape.architecture,
            shape.layers,
            shape.hidden_size,
            shape.attention_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.vocab_size,
        ),
        "heads": HeadFacts(
            config.kind, config.num_heads, top_k, config.projection, config.draft_vocab_size or shape.vocab_size, scaling
        ),
        "text": text,
        "dtype": dtype,
        "variants": variants,
        "heads_graph": "onnx/heads.onnx",
    }


def _check(
    staging: Path, manifest: dict[str, Any], limits: Limits, backbone: Backbone, stack: HeadStack, report: Report
) -> dict[str, CheckReport]:
    """Run every variant against the torch module."""
    shape, heads = backbone.shape, manifest["heads"]
    layout = CacheLayout(shape.layers, 1, shape.kv_heads, limits.cache_rows, shape.head_dim, manifest["dtype"])
    sizes = (heads.num_heads, heads.top_k, shape.hidden_size, shape.vocab_size)
    reports = {}
    for name, path in manifest["variants"].items():
        report(f"checking the {name} graph")
        executor = OrtExecutor(OrtModel(staging / path, staging / manifest["heads_graph"], layout, *sizes))
        reports[name] = check_executor(executor, backbone, stack)
    return reports


def _check_linked(
    staging: Path, manifest: dict[str, Any], limits: Limits, backbone: Backbone, stack: HeadStack, report: Report
) -> tuple[dict[str, CheckReport], dict[str, Any]]:
    """Run every variant of the first layers against the torch module, and look up every place in the whole graphs.

    ``stack`` is used up: it reads the real weights from now on.
    """
    assert backbone.linked is not None
    cut, real = first_layers(backbone)
    stack.project_through(cut.module.get_output_embeddings())
    report(f"tracing {cut.shape.layers} layers for the check")
    prefix = "check."
    graphs = _write_graphs(cut, stack, limits.cache_rows, staging / "onnx", lambda _phase: None, prefix)
    shape, heads = cut.shape, manifest["heads"]
    layout = CacheLayout(shape.layers, 1, shape.kv_heads, limits.cache_rows, shape.head_dim, manifest["dtype"])
    sizes = (heads.num_heads, heads.top_k, shape.hidden_size, shape.vocab_size)
    observed = {}
    for name, path in graphs.items():
        report(f"checking {shape.layers} layers of the {name} graph")
        model = OrtModel(staging / path, staging / f"onnx/{prefix}heads.onnx", layout, *sizes)
        observed[name] = observe(FrugalExecutor(model), heads.num_heads, shape.vocab_size, prompt_rows=PROMPT_ROWS)
    report(f"checking {shape.layers} layers of the torch module")
    stack.project_through(real.get_output_embeddings())
    checks = compare_all(observed, replace(cut, module=real), stack)
    report("checking where all weights lie")
    needed = {tensor.name: tensor for tensor in backbone.linked.stored.values()}
    places = {
        name: asdict(check_places(staging / path, needed, backbone.shape.layers)) for name, path in manifest["variants"].items()
    }
    for path in (staging / "onnx").glob(f"{prefix}*"):
        path.unlink()
    files = {f"onnx/{name}": how for name, how in backbone.linked.files.items()}
    return checks, {"files": files, "checked_layers": shape.layers, "layers": backbone.shape.layers, "places": places}
