"""Reads and writes ``engine.json``, the record of a TensorRT plan.

A plan can be inspected only on the GPU that it was built for. The builder therefore records its inputs, outputs, profiles,
sources, and the course of the build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BundleIntegrityError, BundleSchemaError
from .json_file import is_int, is_strings, record
from .plan_file import Compression, parse_compression
from .weight_inputs import WeightInput, parse_weight_inputs

RECORD_NAME = "engine.json"
RECORD_VERSION = 5
MAX_RECORD_BYTES = 1 << 20

Range = tuple[int, int, int]
"""Smallest, best and largest size."""

OLDEST_TARGETS = {"int8": 75, "int4": 80, "fp8": 89}
"""The oldest GPU architecture that has the numbers of a precision, as TensorRT-RTX 1.7.1 takes them."""
_AXES = ("rows", "logit_rows", "slots", "columns", "carried")


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes that a plan was optimised for: rows N, rows with logits R, slots B, visible cache rows T, carried rows P.

    ``head_rows``: rows W that the heads run at, in engines whose graph has that input.
    """

    name: str
    rows: Range
    logit_rows: Range
    slots: Range
    columns: Range
    carried: Range
    head_rows: Range = (1, 1, 1)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Name, numpy dtype and shape of an input or output. A size of -1 varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BuildLog:
    """Measurements of the build of one plan.

    ``network_sha256``: sha256 of the ONNX file that was parsed; int8 makes that file at build time. ``layers``: layers of the
    network. ``attention_calls``: number of fused attention kernels, counted by the names in the plan. It is layers × profiles if
    all are fused: a hint, not a contract. ``kernels``: calls by the kernel's name, over all profiles. ``constants``:
    bytes that the plan stores, by type. ``peak_rss_bytes``: peak memory of the building process, mapped files included.
    """

    network_sha256: str
    layers: int
    attention_calls: int
    parse_seconds: float
    build_seconds: float
    peak_rss_bytes: int
    plan_bytes: int
    kernels: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The engine of one target. File names are relative to the record.

    ``variant``: name of the bundle's graph that was built. ``graph_sha256``: sha256 of that graph's file. ``sources``: sha256 of
    every file of the bundle that went into the plans. ``versions``: of the programs that built the plans. ``features``: features
    that the builder was asked for, by name. ``logs``: measurements by plan. ``compression``: by plan; a plan without an entry is
    stored as TensorRT wrote it.

    ``precision``: of the backbone's weights: ``fp16``, ``int8``, ``int4`` or ``fp8``. ``quantised`` says what else there is:
    ``projection`` and ``heads`` where they differ from the rule (``PrecisionOptions`` of the exporter); ``block`` and
    ``rounding`` of int4 (with ``data_sha256`` of the texts for GPTQ); ``scales_sha256``, with which int8 and fp8 have the
    backbone's activations in 8 bits too, except in the layers of ``keep`` (``auto``: layers whose error is too large).

    ``weight_inputs``: the weights of both plans if ``weights`` is ``streamed``. A plan takes those that it has an input for.
    """

    backend: str
    backend_version: str
    target: str
    precision: str
    weights: str
    plan: str
    heads_plan: str
    graph_sha256: str
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    warnings: tuple[str, ...]
    variant: str
    features: tuple[str, ...]
    sources: Mapping[str, str]
    versions: Mapping[str, str]
    logs: Mapping[str, BuildLog]
    weight_inputs: tuple[WeightInput, ...] = ()
    compression: Mapping[str, Compression] = field(default_factory=dict)
    quantised: Mapping[str, Any] = field(default_factory=dict)
    record_version: int = RECORD_VERSION

    def to_json(self) -> str:
        """Returns the file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


# Fields that a record of version 1 lacks. It was always built from the standard graph, which carries no rows.
_ADDED_IN_2 = {"variant": "standard", "features": [], "sources": {}, "versions": {}, "logs": {}, "weight_inputs": []}


def check_record_size(name: str, size: int) -> None:
    """Refuses a file that is too large for a record, before it is read.

    Raises:
        BundleIntegrityError: ``size`` is over ``MAX_RECORD_BYTES``.
    """
    if size > MAX_RECORD_BYTES:
        raise BundleIntegrityError(f"{name} is over the limit of {MAX_RECORD_BYTES} bytes", hint="don't use this bundle")


def parse_engine_record(text: str | bytes) -> EngineRecord:
    """Reads a record of this version or an older one.

    Raises:
        BundleSchemaError: the text isn't a record, or a newer program wrote it.
    """
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw["record_version"]
        if not is_int(version) or version < 1:
            raise ValueError(f"record_version is {version!r}")
        if version > RECORD_VERSION:
            raise BundleSchemaError(
                f"{RECORD_NAME} has version {version}; this program reads up to {RECORD_VERSION}", hint="upgrade medusa-deploy"
            )
        if version == 1:
            profiles = [{"carried": [1, 1, 1], **entry} for entry in raw["profiles"]]
            raw = {**_ADDED_IN_2, **raw, "profiles": profiles}
        if version in (1, 2):
            raw = {"compression": {}, **raw}
        if version in (1, 2, 3):
            raw = {**raw, "int8": {}}
        if version in (1, 2, 3, 4):
            raw = {**raw, "quantised": raw["int8"]}
            del raw["int8"]
        raw = {**raw, "record_version": RECORD_VERSION}
        read = {
            "profiles": tuple(record(Profile, {**entry, **_ranges(entry)}, defaults=True) for entry in raw["profiles"]),
            "inputs": _tensors(raw["inputs"]),
            "outputs": _tensors(raw["outputs"]),
            "warnings": _strings(raw["warnings"]),
            "features": _strings(raw["features"]),
            "weight_inputs": parse_weight_inputs(raw["weight_inputs"]),
            "logs": {name: record(BuildLog, entry, defaults=True) for name, entry in raw["logs"].items()},
            "compression": parse_compression(raw["compression"]),
        }
        found: EngineRecord = record(EngineRecord, {**raw, **read}, defaults=True)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleSchemaError(f"{RECORD_NAME} can't be read: {error}", hint="build the engine again") from None
    return found


def _strings(value: Any) -> tuple[str, ...]:
    if not is_strings(value):
        raise ValueError(f"{value!r:.80} is no list of strings")
    return tuple(value)


def _tensors(raw: Any) -> tuple[TensorRecord, ...]:
    if not isinstance(raw, list) or not all(isinstance(entry["shape"], list) for entry in raw):
        raise ValueError(f"{raw!r:.80} is no list of tensors")
    return tuple(record(TensorRecord, {**entry, "shape": tuple(entry["shape"])}) for entry in raw)


def _ranges(profile: Any) -> dict[str, Range]:
    heads = {} if "head_rows" not in profile else {"head_rows": _range(profile["head_rows"], least=0)}
    return {**{axis: _range(profile[axis]) for axis in _AXES}, **heads}


def _range(value: Any, least: int = 1) -> Range:
    if not isinstance(value, list) or len(value) != 3 or not all(map(is_int, value)):
        raise ValueError(f"{value!r:.80} is no range")
    if not least <= value[0] <= value[1] <= value[2]:
        raise ValueError(f"{value!r:.80} is no range")
    return value[0], value[1], value[2]
