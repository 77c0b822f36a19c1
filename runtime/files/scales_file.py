"""Reads and writes ``scales.json``: the int8 scales of a model's activations and weights, and the data they were measured on.

Scales are symmetric: value = scale · integer in −127 … 127, zero point 0. A layer is a MatMul or Gemm with a constant weight,
named as its node. An activation is named as its tensor. The bundle's standard graph and its device graph, which engines are built
from, share these names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import ScalesError, ScalesMismatchError
from .json_file import is_int, is_number, read_json_file, record
from .manifest import Manifest

SCHEMA_VERSION = 2
LEVELS = 127
BLOCK = 64
GRIDS = ("block", "tensor")
"""The values that share a scale.

``block``: 64 channels of a row of the activation; 64 inputs of an output channel of the weight. ``tensor``: the whole activation;
an output channel of the weight.
"""
_FIELDS = {"schema_version", "method", "provenance", "layers", "activations", "weights", "smoothing", "takers"}
TAKERS = ("norm", "layer", "values")
SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
MAX_SCALES_BYTES = 1 << 30
_HINT = "make scales with: medusa-deploy calibrate BUNDLE --data FILE -o scales.json"


@dataclass(frozen=True, slots=True)
class Layer:
    """A matrix product: the activation [.., C] that it reads, its weight, and the weight's axis (0 or 1) of output channels."""

    activation: str
    weight: str
    axis: int


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """The scale of a whole activation, and its statistics over ``rows`` vectors.

    ``scale``: 127 · scale is the largest magnitude that isn't clipped. ``largest``: largest magnitude seen. ``clipped``: share of
    the values beyond the range. ``zeroed``: share of the values whose int8 value is 0. ``relative_error``: rms of (int8 value −
    value) over rms of value; a few huge values may dominate it. ``channel_maxima`` float32 [C]: largest magnitude by channel.
    """

    scale: float
    largest: float
    rows: int
    clipped: float
    zeroed: float
    relative_error: float
    channel_maxima: np.ndarray


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Smoothing of an activation x: y = (x / factors) (factors · W), with ``factors`` float32 [C], one for each channel.

    ``alpha``: exponent that the factors were made with; None leaves the activation as it is, with factors of 1. ``error``: mean
    over rows of ‖y − y_int8‖² / ‖y‖² with smoothing, for the products that read the activation. ``unsmoothed_error``: the same
    without smoothing.
    """

    alpha: float | None
    error: float
    unsmoothed_error: float
    factors: np.ndarray


@dataclass(frozen=True, slots=True)
class Taker:
    """Takes 1/factors of a smoothed activation, so that dividing it costs nothing.

    ``kind`` is one of ``TAKERS``. ``norm``: the constant vector ``name`` that the activation is a multiple of. ``layer``: the
    output channels, and the bias, of the layer ``name`` that the activation is a multiple of. ``values``: the same for the layer
    whose outputs are attention's values; its ``heads`` are shared by ``queries`` query heads each, which have one factor.
    """

    kind: str
    name: str
    heads: int = 1
    queries: int = 1


@dataclass(frozen=True, slots=True)
class Scales:
    """The int8 scales of a model. Scales and maxima of activations and weights are those of the unsmoothed model.

    ``method``: name of the rule that chose the ranges of activations. ``weights``: (name, axis) to scales float32, one for each
    output channel. ``smoothing``: by activation and grid (one of ``GRIDS``), for activations that can be smoothed. ``takers``: by
    activation, the taker of 1/factors; files of older versions have none. ``provenance``: ``model_sha256``
    (:func:`model_digest`), ``data_sha256`` of the prompts' token ids, prompts, rows, versions.
    """

    method: str
    layers: Mapping[str, Layer]
    activations: Mapping[str, ActivationScale]
    weights: Mapping[tuple[str, int], np.ndarray]
    provenance: Mapping[str, Any]
    smoothing: Mapping[str, Mapping[str, Smoothing]] = field(default_factory=dict)
    takers: Mapping[str, Taker] = field(default_factory=dict)

    def of_layer(self, name: str) -> tuple[ActivationScale, np.ndarray]:
        """Returns the scales of a layer's activation and of its weight.

        Raises:
            ScalesError: the file has no layer of this name.
        """
        layer = self.layers.get(name)
        if layer is None:
            raise ScalesError(
                f"there are no scales for the layer {name!r}: {len(self.layers)} others have them",
                hint=f"its weight isn't constant, or the graph is another one. {_HINT}",
            )
        return self.activations[layer.activation], self.weights[layer.weight, layer.axis]

    def to_json(self) -> str:
        """Returns the file's text."""
        activations = {
            name: {**asdict(entry), "channel_maxima": _numbers(entry.channel_maxima)} for name, entry in self.activations.items()
        }
        content = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "provenance": dict(self.provenance),
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "activations": activations,
            "weights": [{"name": name, "axis": axis, "scales": _numbers(s)} for (name, axis), s in self.weights.items()],
            "smoothing": {
                name: {grid: _smoothing_json(entry) for grid, entry in grids.items()} for name, grids in self.smoothing.items()
            },
            "takers": {name: asdict(taker) for name, taker in self.takers.items()},
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def model_digest(manifest: Manifest) -> str:
    """Identifies a model: sha256 (hex) over the hashes of the standard graph and of the files beside it that aren't graphs.

    Engines, tokenizers and files in folders below don't count: a bundle may gain or change them and stays the same model.
    """
    standard = manifest.graph("standard")
    folder = PurePosixPath(standard).parent
    names = [name for name in manifest.files if PurePosixPath(name).parent == folder and not name.endswith(".onnx")]
    hashes = [manifest.files[name].sha256 for name in (standard, *sorted(names))]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def read_scales(path: Path | str, manifest: Manifest) -> Scales:
    """Reads scales and checks that they were measured on the model of the bundle with this ``manifest``.

    Raises:
        ScalesError: the file is missing, too large or not JSON, its schema is newer, or a field breaks a rule.
        ScalesMismatchError: the scales belong to another model.
    """
    path = Path(path)
    raw = read_json_file(path, limit=MAX_SCALES_BYTES, error=ScalesError, hint=_HINT)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ScalesError(
            f"{path} has schema version {version}; this program reads up to {SCHEMA_VERSION}", hint="upgrade medusa-deploy"
        )
    try:
        scales = _parse(raw)
        found = scales.provenance["model_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ScalesError(f"{path} holds no scales: {error!r:.200}", hint=_HINT) from None
    expected = model_digest(manifest)
    if found != expected:
        raise ScalesMismatchError(
            f"{path} was measured on the model {str(found)[:16]}…, the bundle holds {expected[:16]}…",
            hint=f"scales fit one model only. {_HINT}",
        )
    return scales


def _parse(raw: Any) -> Scales:
    """Builds the record. A wrong type or value raises whatever Python raises for it there."""
    version = raw["schema_version"]
    if not is_int(version) or version not in (1, SCHEMA_VERSION):
        raise ValueError(f"schema_version is {version!r}")
    if unknown := set(raw) - (_FIELDS if version > 1 else _FIELDS - {"smoothing", "takers"}):
        raise ValueError(f"there are no fields {sorted(unknown)}")
    layers = {name: record(Layer, entry) for name, entry in raw["layers"].items()}
    activations = {
        name: record(ActivationScale, {**entry, "channel_maxima": _array(entry["channel_maxima"], 0.0)})
        for name, entry in raw["activations"].items()
    }
    weights = {(entry["name"], entry["axis"]): _array(entry["scales"], SMALLEST_SCALE) for entry in raw["weights"]}
    if len(weights) != len(raw["weights"]) or any(set(entry) != {"name", "axis", "scales"} for entry in raw["weights"]):
        raise ValueError("a weight has two scales, or a field that no weight has")
    for name, layer in layers.items():
        if layer.activation not in activations or (layer.weight, layer.axis) not in weights:
            raise ValueError(f"the layer {name} has no scales")
    for name, activation in activations.items():
        if not SMALLEST_SCALE <= activation.scale < np.inf or not all(map(math.isfinite, _statistics(activation))):
            raise ValueError(f"the scale of {name} is {activation.scale!r}, with {_statistics(activation)!r:.200}")
    smoothing = {
        name: {grid: _smoothing(grids[grid], len(activations[name].channel_maxima)) for grid in _grids(grids)}
        for name, grids in (raw["smoothing"] if version > 1 else {}).items()
    }
    takers = {name: record(Taker, entry, defaults=True) for name, entry in raw.get("takers", {}).items()}
    for name, taker in takers.items():
        if name not in smoothing or not _is_taker(taker, layers, len(activations[name].channel_maxima)):
            raise ValueError(f"{taker!r} takes no factors of {name}")
    found = {"layers": layers, "activations": activations, "weights": weights, "smoothing": smoothing, "takers": takers}
    scales: Scales = record(Scales, {"method": raw["method"], "provenance": raw["provenance"], **found})
    return scales


def _statistics(scale: ActivationScale) -> tuple[float, ...]:
    return scale.largest, scale.clipped, scale.zeroed, scale.relative_error


def _is_taker(taker: Taker, layers: Mapping[str, Layer], channels: int) -> bool:
    if taker.kind not in TAKERS or not isinstance(taker.name, str) or (taker.kind != "norm" and taker.name not in layers):
        return False
    counts = (taker.heads, taker.queries)
    if taker.kind != "values":
        return counts == (1, 1)
    return all(type(count) is int and count > 0 for count in counts) and channels % (taker.heads * taker.queries) == 0


def _grids(raw: Any) -> tuple[str, ...]:
    if set(raw) != set(GRIDS):
        raise ValueError(f"a smoothing has the grids {sorted(raw)}")
    return GRIDS


def _smoothing(entry: Any, channels: int) -> Smoothing:
    """Reads a smoothing. The file leaves out factors that are all 1."""
    factors = _array(entry.get("factors", [1.0] * channels), SMALLEST_SCALE)
    found: Smoothing = record(Smoothing, {**entry, "factors": factors})
    if len(found.factors) != channels or (found.alpha is None) != ("factors" not in entry):
        raise ValueError(
            f"a smoothing has alpha {found.alpha!r} and {len(found.factors)} factors for {channels} channels"
        )
    bounds = ((found.alpha or 0.0, 1.0), (found.error, np.inf), (found.unsmoothed_error, np.inf))
    if not all(0 <= value <= most and np.isfinite(value) for value, most in bounds):
        raise ValueError(f"a smoothing has alpha {found.alpha!r} and errors {found.error!r}, {found.unsmoothed_error!r}")
    return found


def _smoothing_json(smoothing: Smoothing) -> dict[str, Any]:
    content = asdict(smoothing)
    factors = content.pop("factors")
    return content if smoothing.alpha is None else {**content, "factors": _numbers(factors)}


def _array(values: Any, least: float) -> np.ndarray:
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ValueError(f"{values!r:.60} is no list of numbers")
    with np.errstate(over="ignore"):  # an overflow gives infinity, refused below
        array = np.array(values, np.float32)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or array.min() < np.float32(least):
        raise ValueError(f"{values!r:.60} is no list of finite numbers from {least:g}")
    return array


def _numbers(array: np.ndarray) -> list[float]:
    """Rounds numbers to the digits that a float32 needs to be read back unchanged."""
    return [float(f"{value:.9g}") for value in array.tolist()]
