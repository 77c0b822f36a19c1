"""Makes the ONNX files that a builder parses from a bundle: which graph, in which precision, with its weights where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

from ...runtime.errors import UsageError
from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import Scales, read_scales
from ...runtime.files.weight_inputs import WeightInput
from ..quantise.blocks import Moments
from ..quantise.engine_formats import FORMATS
from ..quantise.engine_weights import write_quantised
from ..quantise.w8a8 import DEFAULTS, PrecisionOptions, quantise_network
from ..weights import WeightsFile, read_graph
from .streamed import WeightStreamer, stream_quantised

VARIANT = "device"
PRECISIONS = ("fp16", *FORMATS)
WEIGHTS = ("inside", "streamed")
WEIGHTS_FILE = "weights.bin"
"""Holds the weights of a network that was made at build time."""


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """Names the ONNX files to parse, of the step and of the heads alone, and the weights that they take as inputs."""

    step: Path
    heads: Path
    weight_inputs: tuple[WeightInput, ...] = ()


def check_source(bundle: Bundle, precision: str, weights: str, options: PrecisionOptions = DEFAULTS) -> None:
    """Refuse a precision or a place of weights that :func:`network_source` can't make of the bundle.

    Raises:
        UsageError: a bundle in fp32 or without the graph, an unknown precision, weights that can't be placed so.
        ScalesError, ScalesMismatchError: no scales, or another model's.
    """
    manifest = bundle.manifest
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and options != DEFAULTS:
        raise UsageError(
            "scales, blocks and precisions of parts say nothing in fp16", hint="give --precision int8, int4 or fp8 as well"
        )
    if precision == "int4" and options.keep is not None:
        raise UsageError("int4 keeps all activations in fp16", hint="leave --keep out")
    if options.block is not None and "int4" not in options.precisions(precision):
        raise UsageError(f"{precision} has no blocks of inputs", hint="leave --block out, or give --precision int4")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown place for weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
    if weights == "streamed" and precision == "int8" and options.scales is None:
        raise UsageError(
            "weights as inputs in int8: they would be widened to fp16 in every step",
            hint="use --weights inside, or --scales as well: products of two int8 tensors read them as they are",
        )
    if manifest.dtype != "float16":
        raise UsageError(f"the bundle's graph is {manifest.dtype}", hint="TensorRT engines are built of: export --dtype fp16")
    if VARIANT not in manifest.variants:
        raise UsageError(
            f"the bundle has no {VARIANT} graph, only {', '.join(manifest.variants)}",
            hint="it was written by an older version: export it again",
        )
    _scales(bundle, options)


@contextmanager
def network_source(
    bundle: Bundle,
    precision: str,
    weights: str,
    scratch: Path,
    options: PrecisionOptions = DEFAULTS,
    moments: Mapping[str, Moments] | None = None,
) -> Iterator[NetworkSource]:
    """Provide the files to parse, valid inside the block. Files that have to be made go into the empty folder ``scratch``.

    ``moments``: E[xᵀx] by the names of weights, for int4 and fp8.

    Raises:
        UsageError, ScalesError: see :func:`check_source`; or a layer to keep isn't there.
        QuantisationError: a weight can't be stored in few bits.
        OSError: the file system refused.
    """
    check_source(bundle, precision, weights, options)
    step, heads = _graphs(bundle)
    made = NetworkSource(scratch / PurePosixPath(step).name, scratch / PurePosixPath(heads).name)
    if precision == "fp16":
        if weights == "inside":
            yield NetworkSource(bundle.path(step), bundle.path(heads))
            return
        streamer = WeightStreamer(bundle)
        onnx.save(streamer.stream(step), made.step)
        onnx.save(streamer.stream(heads), made.heads)
        yield replace(made, weight_inputs=streamer.inputs)
        return
    quantise = partial(quantise_network, options=options, scales=_scales(bundle, options), precision=precision, moments=moments)
    streamed = weights == "streamed"
    with WeightsFile(scratch / WEIGHTS_FILE) as file:
        write_quantised(bundle.path(step), made.step, file, quantise, turned=streamed)
        write_quantised(bundle.path(heads), made.heads, file, quantise, turned=streamed)
    yield replace(made, weight_inputs=stream_quantised(made.step, made.heads)) if streamed else made


def place_weights(source: NetworkSource, staging: Path, folder: str) -> tuple[WeightInput, ...]:
    """Put weights that were made for the network beside the plan in ``staging``, which becomes ``folder`` of the bundle.

    Returns the inputs with the pieces' final places.
    """
    if not any(piece.file == WEIGHTS_FILE for weight in source.weight_inputs for piece in weight.pieces):
        return source.weight_inputs
    made = source.step.parent / WEIGHTS_FILE
    try:
        os.link(made, staging / WEIGHTS_FILE)  # the engines of several targets share one file
    except OSError:
        shutil.copyfile(made, staging / WEIGHTS_FILE)
    name = f"{folder}/{WEIGHTS_FILE}"
    return tuple(replace(w, pieces=tuple(piece._replace(file=name) for piece in w.pieces)) for w in source.weight_inputs)


def source_files(bundle: Bundle) -> dict[str, str]:
    """Return the sha256, by relative path, of every file that goes into an engine: graphs, and the weights that they name."""
    names = dict.fromkeys(_graphs(bundle))
    for graph in _graphs(bundle):
        for tensor in _external(read_graph(bundle.path(graph))):
            names[(PurePosixPath(graph).parent / tensor.location).as_posix()] = None
    return {name: bundle.manifest.files[name].sha256 for name in names}


def weights_bytes(bundle: Bundle, precision: str, options: PrecisionOptions = DEFAULTS) -> int:
    """Count the bytes of the weights that a target's two plans hold."""
    total = 0
    for graph in _graphs(bundle):
        model = read_graph(bundle.path(graph))
        total += sum(tensor.nbytes for tensor in _external(model))
        if precision != "fp16":
            report = quantise_network(model, options, None, precision)
            total += report.bytes_after - report.bytes_before
    return total


def _scales(bundle: Bundle, options: PrecisionOptions) -> Scales | None:
    return None if options.scales is None else read_scales(options.scales, bundle.manifest)


def _graphs(bundle: Bundle) -> tuple[str, str]:
    return bundle.manifest.variants[VARIANT], bundle.manifest.heads_graph


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    values = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in values if isinstance(tensor, ir.ExternalTensor)]
