"""A TensorRT that builds in no time: its plans are a few bytes, and it checks what it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.export import engine
from medusa_deploy.runtime.bundle import open_bundle, write_manifest
from medusa_deploy.runtime.engine_record import TensorRecord
from medusa_deploy.runtime.errors import UsageError
from support.records import write_stub_bundle

SHAPES = {
    "tokens": (-1, -1), "positions": (-1, -1), "ancestors": (-1, -1, -1), "forced": (-1,), "write_index": (-1,), "columns": (-1,),
    "logit_rows": (-1, -1), "kept": (-1, 3), "kept_count": (-1,), "draft_slots": (-1, -1), "past_key.0": (-1, 2, 280, 16),
    "carried_key.0": (-1, 2, -1, 16),
}  # fmt: skip


class FakeGraph:
    """Checks what it is given and writes a plan of a few bytes."""

    def __init__(self, path: Path, during: Callable[[str], None]) -> None:
        self.path, self.during = path, during
        self.profiles: list[dict[str, Any]] = []
        self.warnings = ("a warning",)
        self.outputs = (TensorRecord("last_row", "int64", (-1,)),)

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        return tuple(TensorRecord(name, "int64", shape) for name, shape in SHAPES.items())

    def add_profile(self, shapes: dict[str, Any]) -> None:
        self.profiles.append(shapes)

    def build(self, target: str, output: Path, advance: Any) -> None:
        self.during(target)
        assert advance(1, 2, "tactics") is True
        output.write_text(f"{self.path.name} for {target}, {len(self.profiles)} profiles")


class FakeTensorRT:
    """Stands in for the adapter; ``during`` runs inside every build."""

    during: Callable[[str], None] = staticmethod(lambda _target: None)
    version = "1.0"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.graphs: list[FakeGraph] = []

    def check_target(self, target: str) -> None:
        if not target.startswith("sm_"):
            raise UsageError(target)

    def parse(self, path: Path) -> FakeGraph:
        self.graphs.append(FakeGraph(path, type(self).during))
        return self.graphs[-1]


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorRT]:
    """Put a fake of its own in the place of the adapter."""
    fake = type("Fake", (FakeTensorRT,), {})
    monkeypatch.setattr(engine, "TensorRT", fake)
    return fake


def half_precision_bundle(folder: Path) -> Path:
    """A bundle that opens, says that it is fp16, and can't run."""
    write_stub_bundle(folder)
    write_manifest(folder, dataclasses.replace(open_bundle(folder).manifest, dtype="float16"))
    return folder


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
