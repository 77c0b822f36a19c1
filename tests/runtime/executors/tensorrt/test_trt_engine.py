"""An engine of another bundle or GPU is refused by a named error, before a plan is deserialised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import (
    BundleError,
    BundleIntegrityError,
    DeployError,
    DeviceMemoryError,
    EngineError,
    EngineMismatchError,
    MissingDependencyError,
    UsageError,
)
from medusa_deploy.runtime.executors.tensorrt import engine as trt_engine, load as trt_load
from medusa_deploy.runtime.executors.tensorrt.engine import import_backend, open_plan
from medusa_deploy.runtime.files.bundle import open_bundle, record_files, write_manifest
from support.fake_cuda import FakeRuntime
from support.fake_engine import TARGET, add_fake_engine, fake_gpu, load_fake
from support.fake_trt import FakeConfig, FakeContext, FakeEngine, FakeLoader, FakeTrt, FakeTrtRtx


@pytest.fixture
def folder(engine_bundle: Path, tmp_path: Path) -> Path:
    """Copies ``engine_bundle`` for a test that tampers with it."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


def _rewrite(folder: Path, **fields: Any) -> None:
    """Writes another record, and a manifest with its hash."""
    place = folder / "engines" / TARGET
    record = json.loads((place / "engine.json").read_text())
    (place / "engine.json").write_text(json.dumps({**record, **fields}))
    manifest = open_bundle(folder, check_hashes=False).manifest if _sizes_hold(folder) else _reopened(folder)
    files = {**manifest.files, **{f"engines/{TARGET}/{name}": entry for name, entry in record_files(place).items()}}
    write_manifest(folder, replace(manifest, files=files))


def _sizes_hold(folder: Path) -> bool:
    try:
        open_bundle(folder, check_hashes=False)
    except BundleIntegrityError:
        return False
    return True


def _reopened(folder: Path) -> Any:
    from medusa_deploy.runtime.files.manifest import parse_manifest

    return parse_manifest((folder / "manifest.json").read_bytes())


def _tamper(name: str, how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "engines" / TARGET / name
        path.write_bytes(how(path.read_bytes()))

    return change


def _without_engines(folder: Path) -> None:
    manifest = open_bundle(folder, check_hashes=False).manifest
    write_manifest(folder, replace(manifest, engines={}))


_BAD: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[DeployError], str]] = {
    "no engines": (_without_engines, {}, BundleError, "the bundle has no engines"),
    "another target": (lambda _: None, {"target": "sm_70"}, BundleError, "no engine for 'sm_70', it has sm_89"),
    "another version": (
        lambda folder: _rewrite(folder, backend_version="1.2"),
        {},
        EngineMismatchError,
        "was built by tensorrt 1.2; this process has 9.9",
    ),
    "the other package": (
        lambda folder: _rewrite(folder, backend="tensorrt-rtx"),
        {},
        UsageError,
        "was built by tensorrt-rtx, not by tensorrt",
    ),
    "another graph": (
        lambda folder: _rewrite(folder, graph_sha256="0" * 64),
        {},
        EngineMismatchError,
        "from another graph than the bundle's",
    ),
    "a record of another GPU": (
        lambda folder: _rewrite(folder, target="sm_86"),
        {},
        EngineMismatchError,
        "the engine is for sm_86; this GPU is sm_89",
    ),
    "a tampered plan": (
        _tamper("step.plan", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        {},
        BundleIntegrityError,
        "step.plan has sha256",
    ),
    "a tampered record": (
        _tamper("engine.json", lambda data: data.replace(b'"inside"', b'"insidf"')),
        {},
        BundleIntegrityError,
        "engine.json has sha256",
    ),
    "a plan outside the bundle": (
        lambda folder: _rewrite(folder, plan="../../../step.plan"),
        {},
        BundleIntegrityError,
        "isn't among the manifest's files",
    ),
    "threads": (lambda _: None, {"threads": 2}, UsageError, "takes no threads"),
    "a variant": (lambda _: None, {"variant": "standard"}, UsageError, "takes no variant"),
}


@pytest.mark.parametrize("case", _BAD)
def test_refused_before_anything_is_deserialised(folder: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, options, error, said = _BAD[case]
    change(folder)
    with pytest.raises(error, match=said) as caught:
        load_fake(folder, monkeypatch, gpu, **options)
    assert caught.value.hint
    assert gpu.deserialised == []
    assert not gpu.cuda.device and not gpu.cuda.pinned, "nothing is left allocated"


def test_a_gpu_that_no_engine_is_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeTrt(FakeRuntime(capability=(9, 0)))
    with pytest.raises(EngineMismatchError, match="this GPU is sm_90, the bundle's engines are for sm_89") as caught:
        load_fake(folder, monkeypatch, module)
    assert "--backend tensorrt --target here" in caught.value.hint, "it builds for the GPU of its machine, and by no other name"
    with pytest.raises(EngineMismatchError, match="the engine is for sm_89; this GPU is sm_90") as caught:
        load_fake(folder, monkeypatch, module, target=TARGET)
    assert "--target here" in caught.value.hint
    assert module.deserialised == []


_UNLISTED = (
    "tensorrt-rtx 9.9 builds for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 only: "
    "use the backend cuda, or the backend tensorrt after: "
)


@pytest.mark.parametrize(
    "options",
    [{}, {"target": TARGET}, {"target": "sm_70"}, {"change": _without_engines}],
    ids=["no target", "another GPU's", "no engine of it", "no engines"],
)
@pytest.mark.parametrize(
    ("capability", "hint"),
    [((9, 0), _UNLISTED), ((8, 6), "--target sm_86"), ((12, 0), "--target sm_120")],
    ids=["unlisted", "sm_86", "sm_120"],
)
def test_a_hint_names_only_what_tensorrt_rtx_builds_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], capability: tuple[int, int], hint: str
) -> None:
    _rewrite(folder, backend="tensorrt-rtx")
    options.get("change", lambda _: None)(folder)
    module = FakeTrtRtx(FakeRuntime(capability=capability))
    with pytest.raises((EngineMismatchError, BundleError)) as caught:
        load_fake(folder, monkeypatch, module, backend="tensorrt-rtx", target=options.get("target"))
    assert hint in caught.value.hint
    assert "sm_90" not in caught.value.hint and f"--target {TARGET}" not in caught.value.hint


def test_the_engine_of_this_gpu_is_named_where_another_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake_engine(folder, target="sm_86", rows=(1,))
    with pytest.raises(EngineMismatchError, match="the engine is for sm_89; this GPU is sm_86") as caught:
        load_fake(folder, monkeypatch, FakeTrt(FakeRuntime(capability=(8, 6))), target=TARGET)
    assert caught.value.hint == "use --target sm_86, or name no target"


def test_an_engine_that_was_built_here_runs_on_the_gpu_that_is_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake_engine(folder, target="here", rows=(1, 4))
    module = FakeTrt(FakeRuntime(capability=(9, 0)))
    assert load_fake(folder, monkeypatch, module).max_rows == 4
    assert load_fake(folder, monkeypatch, FakeTrt(FakeRuntime())).max_rows == 16, "its own architecture's engine comes first"


def test_a_missing_package_is_named(engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, gpu)
    monkeypatch.setattr(trt_load, "import_backend", import_backend)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="tensorrt can't be imported") as caught:
        load(engine_bundle, backend="tensorrt")
    assert "pip install 'medusa-deploy[tensorrt]'" in caught.value.hint


def test_a_plan_that_tensorrt_refuses_says_why(folder: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "engines" / TARGET / "step.plan").write_bytes(b"not a plan")
    _rewrite(folder)
    with pytest.raises(EngineError, match="the plan is damaged"):
        load_fake(folder, monkeypatch, gpu)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("inputs", lambda tensors: tensors[1:], "1 inputs differ from the engine's record, such as tokens"),
        ("outputs", lambda tensors: [{**tensors[0], "dtype": "int32"}, *tensors[1:]], "1 outputs differ"),
        ("inputs", lambda tensors: [*tensors[:-1], {**tensors[-1], "shape": [1, 2, 3, 4]}], "1 inputs differ"),
        ("profiles", lambda profiles: profiles[:-1], "the plan has 5 profiles, its record 4"),
    ],
    ids=["an input more", "another dtype", "another shape", "a profile more"],
)
def test_a_plan_that_is_not_what_its_record_says(
    folder: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Any], Any], said: str
) -> None:
    record = json.loads((folder / "engines" / TARGET / "engine.json").read_text())
    _rewrite(folder, **{kind: change(record[kind])})
    with pytest.raises(EngineMismatchError, match=said):
        load_fake(folder, monkeypatch, gpu)


@pytest.mark.parametrize("alias", [None, "past_key.1"], ids=["none", "another cache"])
def test_a_cache_that_is_not_updated_in_place(
    engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch, alias: str | None
) -> None:
    gpu.aliases = lambda name: alias if name == "present_key.0" else name.replace("present", "past")
    with pytest.raises(EngineMismatchError, match="present_key.0 shares memory with"):
        load_fake(engine_bundle, monkeypatch, gpu)


def test_an_engine_that_wants_a_value_on_the_host(engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.on_host = {"kept_count"}
    with pytest.raises(EngineMismatchError, match="wants kept_count on the host"):
        load_fake(engine_bundle, monkeypatch, gpu)


def test_a_gpu_without_room_says_what_for(engine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeTrt(FakeRuntime(memory=100_000))
    with pytest.raises(DeviceMemoryError, match="no memory for the caches"):
        load_fake(engine_bundle, monkeypatch, module)
    assert not module.cuda.device


def test_more_slots_than_the_engine_was_built_for(folder: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((folder / "engines" / TARGET / "engine.json").read_text())
    _rewrite(folder, profiles=[{**profile, "slots": [1, 1, 2]} for profile in record["profiles"]])
    with pytest.raises(UsageError, match="3 slots, the engine takes up to 2"):
        load_fake(folder, monkeypatch, gpu, slots=3)


def test_an_unknown_backend(engine_bundle: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu'") as caught:
        load(engine_bundle, backend="tpu")
    assert "tensorrt-rtx" in caught.value.hint
    with pytest.raises(UsageError, match="the backend cpu takes no target"):
        load(engine_bundle, target=TARGET)


def test_the_exporter_takes_what_both_sides_need_to_know_from_the_runtime() -> None:
    """The loader compares a plan's tensors with the record by the names that the exporter wrote."""
    tensorrt = pytest.importorskip("medusa_deploy.export.engines.tensorrt")
    for name in ("MODULES", "HERE", "numpy_name", "import_backend"):
        assert getattr(tensorrt, name) is getattr(trt_engine, name)
    names = ("HALF", "FLOAT", "INT64", "BF16", "INT8", "FP8")
    assert [trt_engine.numpy_name(f"DataType.{name}") for name in names] == [
        "float16", "float32", "int64", "bfloat16", "int8", "float8_e4m3fn",
    ]  # fmt: skip


@pytest.mark.tensorrt
def test_the_real_package_has_all_that_the_fake_stands_for() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    config = {"cuda_graph_strategy": None, "dynamic_shapes_kernel_specialization_strategy": None}
    for kind, fake in (
        (real.Runtime, vars(FakeLoader)),
        (real.ICudaEngine, vars(FakeEngine)),
        (real.IExecutionContext, {**vars(FakeContext), "is_stream_capturable": None}),
        (real.IRuntimeConfig, {**vars(FakeConfig), **config}),
    ):
        assert [name for name in fake if not name.startswith("_") and not hasattr(kind, name)] == []
    for name in ("ExecutionContextAllocationStrategy", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"):
        assert {member.name for member in getattr(FakeTrtRtx, name)} <= set(getattr(real, name).__members__)


@pytest.mark.tensorrt
def test_the_real_package_refuses_a_plan_by_name(folder: Path) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(folder, check_hashes=False)
    with pytest.raises(EngineError, match="can't load step.plan for sm_89: ") as caught:
        open_plan(real, bundle, TARGET, "step.plan")
    assert "no reason given" not in caught.value.message
