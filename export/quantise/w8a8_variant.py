"""Writes the standard graph as an int8 engine computes it: a variant for ONNX Runtime that shows what engines do to quality."""

from __future__ import annotations

from collections.abc import Iterable

from ...runtime.errors import BundleExistsError, UsageError
from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import Scales
from ..variant import add_variant
from ..weights import read_graph
from .engine_weights import quantise_weights
from .w8a8 import parts, quantise_activations

NAME = "int8"


def write_w8a8_variant(bundle: Bundle, scales: Scales, keep: Iterable[str] | None = None, *, force: bool = False) -> Bundle:
    """Add the variant ``int8`` and return the bundle as it is now.

    Its backbone computes as an engine built with these scales does: smoothed, with activations and weights in 8 bits. ``keep``:
    see :class:`.w8a8.Int8Options`. Kept layers, the vocabulary projection and the heads stay as they are; an engine has their
    weights in 8 bits.

    Raises:
        BundleExistsError: the bundle has the variant, and ``force`` is false.
        UsageError: a layer to keep isn't there, or the bundle's graphs are of an older version.
        QuantisationError: a weight holds NaN or infinity, or overflows.
        OutputError: the file system refused.
    """
    manifest = bundle.manifest
    if NAME in manifest.variants and not force:
        raise BundleExistsError(f"the bundle has a variant {NAME}", hint="replace it with force")
    if "cpu" not in manifest.variants:
        raise UsageError("the bundle has no graph for the CPU", hint="it was written by an older version: export it again")
    model = read_graph(bundle.path(manifest.graph("standard")))
    done = quantise_activations(model, scales, keep)
    names = parts(model.graph)
    report = quantise_weights(model, set(names) - set(done))
    backbone = [name for name, part in names.items() if part == "backbone"]
    facts = {"layers": len(done), "kept": sorted(set(backbone) - set(done)), "bytes_before": report.bytes_before}
    return add_variant(bundle, NAME, model, {**facts, "bytes_after": report.bytes_after, "scales": dict(scales.provenance)})
