"""Makes the ONNX files that a builder parses from a bundle: which graph, in which precision, with its weights where."""

from __future__ import annotations

from collections.abc import Iterator
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
from ..quantise.engine_weights import write_quantised
from ..quantise.w8a8 import WEIGHTS_ONLY, Int8Options, quantise_network
from ..weights import WeightsFile, read_graph
from .streamed import WeightStreamer

VARIANT = "device"
PRECISIONS = ("fp16", "int8")
WEIGHTS = ("inside", "streamed")


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """Names the ONNX files to parse, of the step and of the heads alone, and the weights that they take as inputs."""

    step: Path
    heads: Path
    weight_inputs: tuple[WeightInput, ...] = ()


def check_source(bundle: Bundle, precision: str, weights: str, int8: Int8Options = WEIGHTS_ONLY) -> None:
    """Refuse a precision or a place of weights that :func:`network_source` can't make of the bundle.

    Raises:
        UsageError: a bundle in fp32 or without the graph, an unknown precision, weights that can't be placed so.
        ScalesError, ScalesMismatchError: no scales, or another model's.
    """
    manifest = bundle.manifest
    if precision != "int8" and int8 != WEIGHTS_ONLY:
        raise UsageError(f"scales and what stays fp16 say nothing in {precision}", hint="give --precision int8 as well")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    if weights not in WEIGHTS:
        raise UsageError(f"unknown place for weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
    if weights == "streamed" and precision != "fp16":
        raise UsageError(
            f"weights as inputs in {precision}: they would be dequantised in every step", hint="use --weights inside, or fp16"
        )
    if manifest.dtype != "float16":
        raise UsageError(f"the bundle's graph is {manifest.dtype}", hint="TensorRT engines are built of: export --dtype fp16")
    if VARIANT not in manifest.variants:
        raise UsageError(
            f"the bundle has no {VARIANT} graph, only {', '.join(manifest.variants)}",
            hint="it was written by an older version: export it again",
        )
    _scales(bundle, int8)


@contextmanager
def network_source(
    bundle: Bundle, precision: str, weights: str, scratch: Path, int8: Int8Options = WEIGHTS_ONLY
) -> Iterator[NetworkSource]:
    """Provide the files to parse, valid inside the block. Files that have to be made go into the empty folder ``scratch``.

    Raises:
        UsageError, ScalesError: see :func:`check_source`; or a layer to keep isn't there.
        QuantisationError: a weight can't be stored in 8 bits.
        OSError: the file system refused.
    """
    check_source(bundle, precision, weights, int8)
    step, heads = _graphs(bundle)
    if weights == "streamed":
        streamer = WeightStreamer(bundle)
        streamed = NetworkSource(scratch / PurePosixPath(step).name, scratch / PurePosixPath(heads).name)
        onnx.save(streamer.stream(step), streamed.step)
        onnx.save(streamer.stream(heads), streamed.heads)
        yield replace(streamed, weight_inputs=streamer.inputs)
        return
    if precision == "fp16":
        yield NetworkSource(bundle.path(step), bundle.path(heads))
        return
    made = NetworkSource(scratch / PurePosixPath(step).name, scratch / PurePosixPath(heads).name)
    quantise = partial(quantise_network, options=int8, scales=_scales(bundle, int8))
    with WeightsFile(scratch / "weights.bin") as file:
        write_quantised(bundle.path(step), made.step, file, quantise)
        write_quantised(bundle.path(heads), made.heads, file, quantise)
    yield made


def source_files(bundle: Bundle) -> dict[str, str]:
    """Return the sha256, by relative path, of every file that goes into an engine: graphs, and the weights that they name."""
    names = dict.fromkeys(_graphs(bundle))
    for graph in _graphs(bundle):
        for tensor in _external(read_graph(bundle.path(graph))):
            names[(PurePosixPath(graph).parent / tensor.location).as_posix()] = None
    return {name: bundle.manifest.files[name].sha256 for name in names}


def weights_bytes(bundle: Bundle, precision: str, int8: Int8Options = WEIGHTS_ONLY) -> int:
    """Count the bytes of the weights that a target's two plans hold."""
    total = 0
    for graph in _graphs(bundle):
        model = read_graph(bundle.path(graph))
        total += sum(tensor.nbytes for tensor in _external(model))
        if precision == "int8":
            report = quantise_network(model, int8, None)
            total += report.bytes_after - report.bytes_before
    return total


def _scales(bundle: Bundle, int8: Int8Options) -> Scales | None:
    return None if int8.scales is None else read_scales(int8.scales, bundle.manifest)


def _graphs(bundle: Bundle) -> tuple[str, str]:
    return bundle.manifest.variants[VARIANT], bundle.manifest.heads_graph


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    values = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in values if isinstance(tensor, ir.ExternalTensor)]
