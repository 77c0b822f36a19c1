"""A bundle with an engine that the fakes run, and a machine that seems to have a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from medusa_deploy.export.engines.plan_packing import pack_plan
from medusa_deploy.runtime.executors.tensorrt import cuda, load as trt_load
from medusa_deploy.runtime.files.bundle import open_bundle, record_files, write_manifest
from medusa_deploy.runtime.files.engine_record import RECORD_VERSION, Profile
from medusa_deploy.runtime.files.manifest import Manifest
from medusa_deploy.runtime.files.weight_inputs import WeightInput
from medusa_deploy.runtime.session import Session, load
from support.fake_cuda import FakeRuntime
from support.fake_trt import NUMPY_NAMES, FakeTrt, write_plan

TARGET = "sm_89"


def profiles_for(manifest: Manifest, rows: Sequence[int]) -> tuple[Profile, ...]:
    """One profile for prefill, one for each number of rows, as ``build`` makes them."""
    limits = manifest.limits
    columns, slots = (1, min(512, limits.cache_rows), limits.cache_rows), (1, 1, limits.batch)
    chunk = limits.prefill_chunk
    prefill = Profile("prefill", (1, chunk, chunk), (1, 1, 1), (1, 1, 1), columns, (1, 1, 1), (0, 1, 1))
    sizes = [(n, (0 if n == 1 else 1, 1, 1)) for n in rows]
    return prefill, *(
        Profile(f"rows-{n}", (n, n, n), (n, n, n), slots, columns, (1, n, max(rows)), heads) for n, heads in sizes
    )


def _tensors(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "dtype": NUMPY_NAMES[value.type],
            "shape": [size if isinstance(size, int) else -1 for size in value.shape],
        }
        for value in values
    ]


def add_fake_engine(
    folder: Path,
    *,
    rows: Sequence[int] = (1, 4, 8, 16),
    target: str = TARGET,
    backend: str = "tensorrt",
    network: Path | None = None,
    packed: bool = False,
    weight_inputs: Sequence[WeightInput] = (),
) -> Path:
    """Put an engine into the bundle as ``build`` does: plans that the fake can run, the record, the manifest.

    ``network``: what the plan runs in the place of the bundle's device graph. ``packed``: plans are stored compressed.
    """
    bundle = open_bundle(folder, check_hashes=False)
    manifest = bundle.manifest
    device = manifest.variants["device"]
    graph, heads = (network or bundle.path(device)).resolve(), bundle.path(manifest.heads_graph).resolve()
    profiles = profiles_for(manifest, rows)
    place = folder / "engines" / target
    place.mkdir(parents=True)
    write_plan(place / "step.plan", graph, profiles)
    write_plan(place / "heads.plan", heads, [replace(profiles[0], slots=(1, 1, manifest.limits.batch))])
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    record = engine_record(backend, target, manifest.files[device].sha256, profiles, session)
    if packed or weight_inputs:
        record = json.dumps({**json.loads(record), **_newest(place, packed, weight_inputs)})
    (place / "engine.json").write_text(record)
    files = {f"engines/{target}/{name}": entry for name, entry in record_files(place).items()}
    engines = {**manifest.engines, target: f"engines/{target}/engine.json"}
    write_manifest(folder, replace(manifest, files={**manifest.files, **files}, engines=engines))
    return folder


def _newest(place: Path, packed: bool, weight_inputs: Sequence[WeightInput]) -> dict[str, Any]:
    """What the newest version of the record says beside the oldest; plans become compressed files, if ``packed``."""
    stored, compression = {}, {}
    for role, name in (("plan", "step.plan"), ("heads_plan", "heads.plan")):
        path, how = pack_plan(place / name) if packed else (place / name, None)
        stored[role] = path.name
        if how is not None:
            compression[path.name] = asdict(how)
    return {
        "record_version": RECORD_VERSION, "variant": "device", "features": [], "sources": {}, "versions": {}, "logs": {},
        "weight_inputs": [asdict(weight) for weight in weight_inputs], "compression": compression, "quantised": {}, **stored,
    }  # fmt: skip


def engine_record(
    backend: str, target: str, graph_sha256: str, profiles: tuple[Profile, ...], session: onnxruntime.InferenceSession
) -> str:
    """What ``build`` would write down of the graph that ``session`` runs: the least that any version of the record says."""
    record = {
        "record_version": 1,
        "backend": backend,
        "backend_version": FakeTrt.__version__,
        "target": target,
        "precision": "fp16",
        "weights": "inside",
        "plan": "step.plan",
        "heads_plan": "heads.plan",
        "graph_sha256": graph_sha256,
        "profiles": [asdict(profile) for profile in profiles],
        "inputs": _tensors(session.get_inputs()),
        "outputs": _tensors(session.get_outputs()),
        "warnings": [],
    }
    return json.dumps(record)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, module: FakeTrt) -> None:
    """Let this process find ``module`` as TensorRT and its driver as the CUDA runtime."""
    monkeypatch.setattr(cuda, "_import_runtime", lambda: module.cuda)
    monkeypatch.setattr(trt_load, "import_backend", lambda _backend: module)


def load_fake(folder: Path, monkeypatch: pytest.MonkeyPatch, module: FakeTrt | None = None, **options: Any) -> Session:
    """The bundle on the fake GPU."""
    module = module or FakeTrt(FakeRuntime())
    fake_gpu(monkeypatch, module)
    options = {"backend": "tensorrt", "check_hashes": False, **options}
    return load(folder, **options)
