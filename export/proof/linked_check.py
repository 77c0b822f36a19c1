"""Proves what can be proven about a linked export without its weights in memory.

The first layers of a big one, with the real weights and through the same code, are compared with the torch module; small ones are
compared whole. And every place that the whole graphs point to has to hold the tensor that its initializer is named after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...runtime.errors import ExportMismatchError
from ...runtime.executors.executor import CacheLayout
from ...runtime.executors.ort import OrtExecutor, OrtModel
from ..backbone.checkpoint import Report
from ..backbone.linked import CHECKED_LAYERS, LinkedWeights, first_layers
from ..backbone.record import Backbone
from ..backbone.safetensors_header import StoredTensor, read_header
from ..graphs import HEADS_GRAPH, write_graphs
from ..heads.linked import HEADS_FILE
from ..heads.module import HeadStack
from ..quantise.screen import Rounded
from ..trace.failures import named_failures
from .check import (
    CheckReport,
    Observed,
    Reference,
    check_executor,
    checked_steps,
    compare,
    eager_reference,
    graph_windows,
    observe,
    prompt_length,
    with_windows,
)
from .device_executor import DeviceGraphExecutor
from .run_order import run_matmuls_in_turn

# Rows of the prompt. Each takes part in matmuls as wide as the backbone, on a CPU and in fp16.
_PROMPT_ROWS = 8
_PREFIX = "check."
WHOLE_BYTES = 1 << 30
_DTYPES = {"F16": onnx.TensorProto.FLOAT16, "F32": onnx.TensorProto.FLOAT}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
_DECODER = "decoder."


@dataclass(frozen=True, slots=True)
class PlacesReport:
    """Counts the linked initializers (``tensors``) of one graph, and the ``layers`` that they belong to."""

    tensors: int
    layers: int


@named_failures("run")
def check_linked(
    folder: Path,
    variants: dict[str, str],
    layout: CacheLayout,
    capacity: int,
    backbone: Backbone,
    stack: HeadStack,
    report: Report,
    screened: Rounded | None = None,
) -> tuple[dict[str, CheckReport], dict[str, Any]]:
    """Compare every variant with the torch module, and look up every place in the whole graphs.

    Of a backbone of more than a GiB, the first layers are compared. Smaller ones are compared whole.
    ``folder`` holds the graphs and the linked files, and for a while those of the first layers. ``variants``: file names in it.
    ``layout``: of the whole backbone. ``capacity``: tokens of a slot. ``stack`` is used up: it reads the real weights from now
    on. Returns reports by variant, and the facts about weights for the bundle's provenance.

    Raises:
        NumericsError, ExportMismatchError: the first layers don't reproduce the torch module, or a place is wrong.
    """
    weights = backbone.weights
    assert isinstance(weights, LinkedWeights)
    whole = sum(tensor.nbytes for tensor in weights.tensors.values()) <= WHOLE_BYTES
    cut, real = first_layers(backbone, layout.layers if whole else CHECKED_LAYERS)
    sizes = (stack.config.num_heads, stack.top_k, cut.shape.hidden_size, cut.shape.vocab_size)
    few = replace(layout, layers=cut.shape.layers)
    if whole:
        stack.project_through(real.get_output_embeddings())
        checks = check_variants(folder, variants, few, capacity, sizes, replace(cut, module=real), stack, report)
    else:
        checks = _check_cut(folder, few, capacity, sizes, cut, real, stack, report, screened)
    report("checking where all weights lie")
    needed = {tensor.name: tensor for tensor in weights.tensors.values()}
    tables = _tables(backbone)
    places = {name: asdict(check_places(folder / path, needed, layout.layers, tables)) for name, path in variants.items()}
    files = dict(weights.files)
    return checks, {"files": files, "checked_layers": few.layers, "layers": layout.layers, "places": places}


def _check_cut(
    folder: Path,
    layout: CacheLayout,
    capacity: int,
    sizes: tuple[int, int, int, int],
    cut: Backbone,
    real: Any,
    stack: HeadStack,
    report: Report,
    screened: Rounded | None,
) -> dict[str, CheckReport]:
    """Compare every variant of the layers of ``cut`` with ``real``, the same with its weights."""
    stack.project_through(cut.module.get_output_embeddings())
    report(f"tracing {layout.layers} layers for the check")
    graphs = write_graphs(cut, stack, layout.rows, capacity, folder, lambda _phase: None, _PREFIX, screened)
    if screened is not None:
        screened.clear()  # the engines' turn for the memory
    windows, steps = graph_windows(folder / graphs["cpu"]), checked_steps(stack.config.num_heads)
    prompt_rows = prompt_length(real, windows, capacity, steps, _PROMPT_ROWS)
    observed = {}
    for name, path in graphs.items():
        report(f"checking {layout.layers} layers of the {name} graph")
        run_matmuls_in_turn(folder / path)
        model = OrtModel(folder / path, folder / f"{_PREFIX}{HEADS_GRAPH}", layout, *sizes)
        executor = DeviceGraphExecutor(model, frugal_options()) if name == "device" else _FrugalExecutor(model)
        observed[name] = observe(executor, stack.config.num_heads, cut.shape.vocab_size, prompt_rows=prompt_rows)
        del executor  # its weights leave memory before the next one's enter it
    report(f"checking {layout.layers} layers of the torch module")
    stack.project_through(real.get_output_embeddings())
    checks = _compare_all(observed, replace(cut, module=real), stack)
    for written in folder.glob(f"{_PREFIX}*"):
        written.unlink()
    return {name: with_windows(each, windows, prompt_rows + steps) for name, each in checks.items()}


@named_failures("run")
def check_variants(
    folder: Path,
    variants: dict[str, str],
    layout: CacheLayout,
    capacity: int,
    sizes: tuple[int, int, int, int],
    backbone: Backbone,
    stack: HeadStack,
    report: Report,
) -> dict[str, CheckReport]:
    """Run every variant, whole, against the torch module. ``sizes``: heads, candidates, hidden size and vocabulary.

    Raises:
        NumericsError, ExportMismatchError: as :func:`.check.check_executor`.
    """
    windows = graph_windows(folder / variants["cpu"])
    reports = {}
    for name, file in variants.items():
        report(f"checking the {name} graph")
        model = OrtModel(folder / file, folder / HEADS_GRAPH, layout, *sizes)
        executor = DeviceGraphExecutor(model) if name == "device" else OrtExecutor(model)
        reports[name] = check_executor(executor, backbone, stack, capacity, windows)
    return reports


def frugal_options() -> Any:
    """Return options of a session that runs a graph as it is: weights stay mapped; none is prepacked, folded or converted."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False  # it would hold what one step needs in all, from its second run on
    return options


class _FrugalExecutor(OrtExecutor):
    def _open(self, path: Path) -> Any:
        return self._ort.InferenceSession(str(path), frugal_options(), providers=["CPUExecutionProvider"])


def _compare_all(observed: dict[str, Observed], backbone: Backbone, heads: HeadStack) -> dict[str, CheckReport]:
    """Compare every variant with one run of the torch module. All variants saw the same tokens.

    Raises:
        NumericsError, ExportMismatchError: as :func:`.check.compare`.
    """
    known: dict[bytes, np.ndarray] = {}
    run = eager_reference(backbone)

    def remembered(tokens: np.ndarray) -> np.ndarray:
        key = tokens.tobytes()
        if key not in known:
            known[key] = run(tokens)
        return known[key]

    reference: Reference = remembered
    return {name: compare(each, reference, backbone, heads) for name, each in observed.items()}


def check_places(graph: Path, needed: dict[str, StoredTensor], layers: int, tables: Mapping[str, str]) -> PlacesReport:
    """Read the graph and the headers of the files it points to, and compare names, types, shapes and places.

    ``needed``: places of the backbone's parameters, by name. Each must be used, by the initializer of the same name in the
    decoder. ``tables``: the backbone's names of what the step module holds beside its decoder.

    Raises:
        ExportMismatchError: an initializer points to nothing, or to another tensor than its own.
    """
    headers: dict[str, dict[tuple[int, int], StoredTensor]] = {}
    used: set[str] = set()
    for initializer in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        location = place.get("location", "")
        if not location.endswith(".safetensors"):
            continue
        if location not in headers:
            tensors = read_header(graph.parent / location).values()
            headers[location] = {(tensor.offset, tensor.nbytes): tensor for tensor in tensors}
        found = headers[location].get((int(place["offset"]), int(place["length"])))
        shape = tuple(initializer.dims)
        if found is None or found.shape != shape or _DTYPES.get(found.dtype) != initializer.data_type:
            raise _mismatch(graph, initializer.name, f"{list(shape)} at {place}", found)
        if location == HEADS_FILE:  # which tensor of the heads it is shows in what they compute
            continue
        if not _is_named(initializer.name, found.name, tables) or found.name not in needed:
            raise _mismatch(graph, initializer.name, "its own tensor", found)
        used.add(found.name)
    unused = sorted(set(needed) - used)
    if unused:
        raise ExportMismatchError(f"{graph.name} doesn't use {len(unused)} tensors, such as {unused[0]}", hint=_REPORT)
    numbers = {int(match[1]) for name in used if (match := _LAYER.search(name))}
    if numbers != set(range(layers)):
        raise ExportMismatchError(f"{graph.name} uses weights of the layers {sorted(numbers)}, expected {layers}", hint=_REPORT)
    return PlacesReport(len(used), len(numbers))


_REPORT = "this architecture isn't linked rightly: export with --weights copied, and report it with the model's config.json"


def _tables(backbone: Backbone) -> dict[str, str]:
    """Name the parameters of embedding and projection: by their module in the step to what the checkpoint calls them."""
    module = backbone.module
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    embedding, projection = module.get_input_embeddings(), module.get_output_embeddings()
    held = {"embedding": embedding, "projection": projection, "heads.shared": projection}
    return {
        f"{place}.{own}": parameters[id(parameter)] for place, part in held.items() for own, parameter in part.named_parameters()
    }


def _is_named(initializer: str, stored: str, tables: Mapping[str, str]) -> bool:
    """True if an initializer (named by the step module) and a tensor of the checkpoint are the same part of the model."""
    if initializer in tables:
        return stored == tables[initializer]
    part = initializer.removeprefix(_DECODER)
    return part != initializer and f".{stored}".endswith(f".{part}")


def _mismatch(graph: Path, name: str, expected: str, found: StoredTensor | None) -> ExportMismatchError:
    there = "no tensor" if found is None else f"{found.name} {found.dtype} {list(found.shape)}"
    return ExportMismatchError(f"{name} in {graph.name} should be {expected}, and {there} is there", hint=_REPORT)
