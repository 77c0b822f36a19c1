"""Writes a bundle that has one quantised graph for the CPU, and no weight in 4 bytes that a graph could read in fewer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.errors import QuantisationError
from ...runtime.files.backbone import BackboneShape
from ...runtime.files.bundle import Bundle, record_files
from ...runtime.files.manifest import MANIFEST_NAME, cpu_twin
from ...runtime.files.scales_file import Scales
from ..passes.matmuls import find_matmuls, place_of
from ..passes.pack import write_packed
from ..passes.patterns import new_node, replace_uses
from ..weights import WeightsFile, read_graph
from .blocks import Moments
from .cpu import DEFAULT_BLOCKS, Advance, CpuPrecision, CpuReport, few_bits_size, quantise_cpu
from .screen import load_whole

_WEIGHTS = "weights.bin"


def write_few_bits(
    source: Bundle,
    folder: Path,
    name: str,
    precision: CpuPrecision,
    scales: Scales | None,
    moments: Mapping[str, Moments] | None,
    describe: Callable[[CpuReport, CpuPrecision], Mapping[str, Any]],
    advance: Advance = lambda _done, _name: None,
) -> None:
    """Write the CPU graph of ``source``, quantised, and its heads into ``folder``, as a bundle with the variant ``name`` alone.

    Each matrix is in memory while it is rounded, and then in the file. Tables that graphs gather rows from (embeddings, and the
    projection's rows for its largest logits) are in float16. A projection that isn't the embedding has no such table: its largest
    logits are those of its codes. ``describe`` makes the bundle's record of what was done.

    Raises:
        QuantisationError: as :func:`.cpu.quantise_cpu`, or a table has values that float16 can't hold.
    """
    manifest = source.manifest
    graph = PurePosixPath(manifest.graph("cpu")).with_name(f"step.{name}.onnx")
    heads_graph = manifest.heads_graph
    onnx = folder / graph.parent
    onnx.mkdir(parents=True)
    with WeightsFile(onnx / _WEIGHTS) as weights:
        step = load_whole(source.path(manifest.graph("cpu")))

        def stored(done: int, matmul: str) -> None:
            weights.keep(step, onnx)
            advance(done, matmul)

        if not _is_embedding(step):
            precision = replace(precision, rescored=0)
        report = quantise_cpu(step, precision, scales, moments, advance=stored)
        _write(step, folder / graph, weights)
        heads = read_graph(source.path(cpu_twin(heads_graph)))
        if any(precision.block_of(matmul) is not None for matmul in find_matmuls(heads)):
            quantise_cpu(heads, replace(precision, heads=8))
        _write(heads, folder / heads_graph, weights)
    write_packed(folder / graph)
    for file in manifest.files:
        if PurePosixPath(file).parent != graph.parent:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path(file), folder / file)
    dropped = ("plain_step_bytes", "weights")
    facts = {key: value for key, value in manifest.provenance.items() if key not in dropped}
    complete = replace(
        manifest,
        variants={name: graph.as_posix()},
        files=record_files(folder),
        provenance={**facts, "weights": {"kind": "few bits"}, "quantised": {name: dict(describe(report, precision))}},
    )
    (folder / MANIFEST_NAME).write_text(complete.to_json(), "utf-8")


def few_bits_bytes(shape: BackboneShape, parameters: int, bits: int, *, tied: bool) -> int:
    """Estimate the weights of a bundle in few bits: layers, projection in 8 bits, embedding in float16."""
    table = (shape.vocab_size, shape.hidden_size)
    layers = parameters - (1 if tied else 2) * math.prod(table)
    rounded = few_bits_size((layers, 1), bits, DEFAULT_BLOCKS[bits])
    zero_points = layers // DEFAULT_BLOCKS[bits] // 2 if bits == 4 else 0
    return rounded + zero_points + few_bits_size(table, 8, DEFAULT_BLOCKS[8]) + 2 * math.prod(table)


def _is_embedding(step: ir.Model) -> bool:
    """True if the projection's weight is the table that tokens are embedded by: then it is stored anyway."""
    gathered = [node.inputs[0] for node in step.graph if node.op_type == "Gather"]
    tables = [value.const_value for value in gathered if value is not None and value.const_value is not None]
    weights = [weight.const_value for matmul in find_matmuls(step) if matmul.is_projection for weight in matmul.weights]
    return any(place_of(weight) == place_of(table) for weight in weights for table in tables)


def _write(model: ir.Model, path: Path, weights: WeightsFile) -> None:
    halve_tables(model)
    weights.keep(model, path.parent, others=True)
    ir.save(model, path)


def halve_tables(model: ir.Model) -> None:
    """Put the float32 tables that are only gathered from in float16, in place: the rows that were gathered are cast.

    Raises:
        QuantisationError: a table has values that float16 can't hold.
    """
    for value in list(model.graph.initializers.values()):
        tensor, uses = value.const_value, value.uses()
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or not uses:
            continue
        if any(use.node.op_type != "Gather" or use.idx != 0 for use in uses):
            continue
        value.const_value = _halved(value, tensor)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        for node in [use.node for use in uses]:
            rows = node.outputs[0]
            cast = new_node("Cast", [None], {"to": ir.DataType.FLOAT.value}, f"{node.name}/whole")
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), rows.shape
            replace_uses(cast.outputs[0], rows)
            cast.replace_input_with(0, rows)
            rows.type = ir.TensorType(ir.DataType.FLOAT16)
            assert node.graph is not None
            node.graph.insert_after(node, [cast])


def _halved(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Tensor[np.ndarray]:
    whole = tensor.numpy()
    half = np.empty(whole.shape, np.float16)
    step = max(1, (1 << 20) // max(1, whole[0].size))
    with np.errstate(over="ignore"):
        for at in range(0, len(whole), step):
            half[at : at + step] = whole[at : at + step]
            if not np.isfinite(half[at : at + step]).all():
                raise QuantisationError(
                    f"{value.name} has values beyond {np.finfo(np.float16).max}, the largest of float16",
                    hint="export without --precision, and add a variant: medusa-deploy quantise",
                )
    del whole
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return ir.Tensor(half, name=value.name)
