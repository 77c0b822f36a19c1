"""A TensorRT that builds in no time: its plans are a few bytes, and it checks what it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.engines import build as engine
from medusa_deploy.export.engines.builder_process import BuildRequest, BuiltPlan
from medusa_deploy.export.engines.features import is_compatible_target
from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.files.bundle import record_files, write_manifest
from medusa_deploy.runtime.files.engine_record import BuildLog, TensorRecord
from support.records import write_stub_bundle

SHAPES = {
    "tokens": (-1, -1), "positions": (-1, -1), "ancestors": (-1, -1, -1), "forced": (-1,), "write_index": (-1,), "columns": (-1,),
    "logit_rows": (-1, -1), "kept": (-1, 3), "kept_count": (-1,), "draft_slots": (-1, -1), "past_key.0": (-1, 2, 280, 16),
    "carried_key.0": (-1, 2, -1, 16),
}  # fmt: skip
INPUTS = tuple(TensorRecord(name, "int64", shape) for name, shape in SHAPES.items())


class FakeTensorRT:
    """Stands in for the adapter; ``during`` runs inside every build, ``requests`` has what was to be built."""

    during: Callable[[str], None] = staticmethod(lambda _target: None)
    version = "1.0"
    requests: list[BuildRequest]

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def check_target(self, target: str, features: Any = ()) -> None:
        if not is_compatible_target(target) and target != "here":
            raise UsageError(target)

    @classmethod
    def build_plan(cls, request: BuildRequest, advance: Any) -> BuiltPlan:
        assert Path(request.graph).is_file()
        cls.requests.append(request)
        cls.during(request.target)
        assert advance("tactics", 1, 2) is True
        plan = f"{Path(request.graph).read_bytes()!r} for {request.target}, {len(request.profiles)} profiles"
        Path(request.output).write_text(plan)
        log = BuildLog("0" * 64, 7, 2, 0.5, 1.5, 1 << 20, len(plan))
        return BuiltPlan(INPUTS, (TensorRecord("last_row", "int64", (-1,)),), ("a warning",), log)


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorRT]:
    """Put a fake of its own in the place of the adapter and its process."""
    fake = type("Fake", (FakeTensorRT,), {"requests": []})
    monkeypatch.setattr(engine, "TensorRT", fake)
    monkeypatch.setattr(engine, "build_plan", fake.build_plan)
    return fake


def half_precision_bundle(folder: Path) -> Path:
    """A bundle that opens, says that it is fp16, and can't run: its device graph and its heads are one product each."""
    onnx = pytest.importorskip("onnx")
    write_stub_bundle(folder)
    weights = np.random.default_rng(0).normal(size=(2, 128, 256)).astype(np.float16)
    (folder / "onnx" / "weights.bin").write_bytes(weights.tobytes())
    for index, name in enumerate(("step.device", "heads")):
        tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT16, dims=weights.shape[1:])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": "weights.bin", "offset": index * weights[0].nbytes, "length": weights[0].nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        half = onnx.TensorProto.FLOAT16
        x, y = (onnx.helper.make_tensor_value_info(n, half, shape) for n, shape in (("x", ["B", 128]), ("y", ["B", 256])))
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], name, [x], [y], [tensor]
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11)
        onnx.save(model, folder / "onnx" / f"{name}.onnx")
    manifest = dataclasses.replace(_manifest_of(folder), dtype="float16", files=record_files(folder))
    write_manifest(folder, manifest)
    return folder


def _manifest_of(folder: Path) -> Any:
    """The manifest of a bundle whose files were changed."""
    from medusa_deploy.runtime.files.manifest import parse_manifest

    return parse_manifest((folder / "manifest.json").read_bytes())


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
