"""``engine.json``: what a TensorRT plan is, for a program that must know before it loads one.

A plan can't be asked without the GPU that it was built for, so the builder writes down its inputs, outputs and profiles.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .errors import BundleSchemaError

RECORD_NAME = "engine.json"
RECORD_VERSION = 1
MAX_RECORD_BYTES = 1 << 20

Range = tuple[int, int, int]
"""Smallest, best and largest size."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes that a plan was optimised for: rows N, rows with logits R, slots B, visible cache rows T, carried rows P."""

    name: str
    rows: Range
    logit_rows: Range
    slots: Range
    columns: Range
    carried: Range


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Name, numpy dtype and shape of an input or output; -1 where the size varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One target's engine. Files are named relative to the record; ``graph_sha256``: of the ONNX file that was built."""

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
    record_version: int = RECORD_VERSION

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def parse_engine_record(text: str | bytes) -> EngineRecord:
    """Read a record.

    Raises:
        BundleSchemaError: not a record, or one of a newer program.
    """
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw["record_version"]
        if isinstance(version, int) and version > RECORD_VERSION:
            raise BundleSchemaError(
                f"{RECORD_NAME} has version {version}; this program reads up to {RECORD_VERSION}", hint="upgrade medusa-deploy"
            )
        profiles = tuple(
            Profile(entry["name"], *(_range(entry[axis]) for axis in ("rows", "logit_rows", "slots", "columns", "carried")))
            for entry in raw["profiles"]
        )
        inputs, outputs = (
            tuple(TensorRecord(entry["name"], entry["dtype"], tuple(map(int, entry["shape"]))) for entry in raw[kind])
            for kind in ("inputs", "outputs")
        )
        return EngineRecord(
            **{**raw, "profiles": profiles, "inputs": inputs, "outputs": outputs, "warnings": tuple(raw["warnings"])}
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleSchemaError(f"{RECORD_NAME} can't be read: {error}", hint="build the engine again") from None


def _range(value: Any) -> Range:
    smallest, best, largest = map(int, value)
    if not 1 <= smallest <= best <= largest:
        raise ValueError(f"{value} is no range")
    return smallest, best, largest
