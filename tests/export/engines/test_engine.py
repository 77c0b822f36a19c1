"""Engines in a bundle: profiles, the commit, what stays and what is refused; the builder itself is a fake one here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.export.engines import build as engine
from medusa_deploy.export.engines.build import build_engines
from medusa_deploy.export.engines.builder_process import BuildRequest, BuiltPlan, input_shapes
from medusa_deploy.export.engines.options import EngineOptions, default_rows, profiles_for
from medusa_deploy.runtime.errors import (
    BundleBusyError,
    BundleError,
    BundleExistsError,
    BundleIntegrityError,
    BundleSchemaError,
    DeployError,
    EngineError,
    EngineMemoryError,
    QuantisationError,
    UsageError,
)
from medusa_deploy.runtime.files.bundle import open_bundle, sha256, write_manifest
from medusa_deploy.runtime.files.engine_record import RECORD_VERSION, TensorRecord, parse_engine_record
from medusa_deploy.runtime.files.plan_file import plan_bytes
from support.fake_tensorrt import INPUTS, FakeTensorRT, fake_tensorrt, half_precision_bundle, state
from support.records import manifest, write_stub_bundle


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorRT]:
    return fake_tensorrt(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return half_precision_bundle(tmp_path / "bundle")


def test_every_size_of_a_step_gets_a_profile() -> None:
    facts = manifest(max_rows=40, batch=4, prefill_chunk=16)
    assert default_rows(facts) == (1, 4, 8, 16, 32)
    prefill, one, tree = profiles_for(facts, [8, 1, 8])
    assert (prefill.rows, prefill.logit_rows, prefill.slots) == ((1, 16, 16), (1, 1, 1), (1, 1, 1))
    assert (one.name, one.rows, one.slots) == ("rows-1", (1, 1, 1), (1, 1, 4))
    assert (tree.rows, tree.logit_rows) == ((8, 8, 8), (8, 8, 8))
    assert tree.columns[2] == facts.limits.cache_rows
    assert profiles_for(facts, [1], precision="int8")[0].slots == (1, 1, 4), "or the plan holds the weights twice"


@pytest.mark.parametrize(("rows", "prefill"), [([], None), ([0], None), ([41], None), ([1], 15), ([1], 257)])
def test_sizes_that_the_bundle_does_not_allow_are_refused(rows: list[int], prefill: int | None) -> None:
    with pytest.raises(UsageError):
        profiles_for(manifest(max_rows=40, prefill_chunk=16), rows, prefill)


def test_engines_are_added_to_the_bundle(bundle: Path, made: type[FakeTensorRT]) -> None:
    before = state(bundle)
    reports = build_engines(bundle, ["sm_89", "sm_86", "sm_89"], EngineOptions(rows=[1, 8]))
    assert [report["target"] for report in reports] == ["sm_89", "sm_86"]
    opened = open_bundle(bundle)
    assert set(opened.manifest.engines) == {"sm_86", "sm_89"}
    names = ("engine.json", "step.plan", "heads.plan")
    assert {f"engines/{target}/{name}" for target in ("sm_86", "sm_89") for name in names} < set(opened.manifest.files)
    record = parse_engine_record(opened.path(opened.manifest.engines["sm_86"]).read_bytes())
    assert (record.target, record.backend_version, record.warnings) == ("sm_86", "1.0", ("a warning", "a warning"))
    assert [profile.name for profile in record.profiles] == ["prefill", "rows-1", "rows-8"]
    assert record.inputs[0] == TensorRecord("tokens", "int64", (-1, -1))
    assert "3 profiles" in (bundle / "engines" / "sm_86" / record.plan).read_text()
    assert record.sources == {name: opened.manifest.files[f"onnx/{name[5:]}"].sha256 for name in record.sources}
    assert set(record.sources) == {"onnx/step.device.onnx", "onnx/heads.onnx", "onnx/weights.bin"}
    assert record.logs["heads.plan"].layers == 7
    assert record.versions["medusa-deploy"]
    assert {name: data for name, data in state(bundle).items() if name in before and name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


def test_plans_without_weights_are_compressed(bundle: Path, made: type[FakeTensorRT], monkeypatch: pytest.MonkeyPatch) -> None:
    build = made.build_plan

    def repetitive(request: BuildRequest, advance: Any) -> BuiltPlan:
        built = build(request, advance)
        Path(request.output).write_bytes(b"kernel" * 10_000)
        return built

    monkeypatch.setattr(engine, "build_plan", repetitive)
    [inside] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    assert inside["record"].compression == {} and inside["record"].plan == "step.plan"
    [streamed] = build_engines(bundle, ["sm_86"], EngineOptions(rows=[1], weights="streamed"))
    record = streamed["record"]
    names = ("step.plan.xz", "heads.plan.xz")
    assert (record.plan, record.heads_plan) == names == tuple(record.compression) == tuple(record.logs)
    folder = bundle / "engines" / "sm_86"
    assert sorted(path.name for path in folder.iterdir()) == ["engine.json", "heads.plan.xz", "step.plan.xz"]
    stored = (folder / record.plan).read_bytes()
    assert plan_bytes(record.plan, stored, record.compression[record.plan]) == b"kernel" * 10_000
    assert open_bundle(bundle).manifest.files["engines/sm_86/step.plan.xz"].size == len(stored)
    assert parse_engine_record((folder / "engine.json").read_bytes()) == record
    [kept] = build_engines(bundle, ["sm_86"], EngineOptions(rows=[1], weights="streamed"), resume=True)
    assert kept["kept"]


def test_shapes_follow_the_axes(bundle: Path, made: type[FakeTensorRT]) -> None:
    build_engines(bundle, ["sm_89"], EngineOptions(rows=[4, 8]))
    step, heads = made.requests
    prefill, tree, _ = (input_shapes(INPUTS, step.axes, sizes) for sizes in step.profiles)
    assert tree["ancestors"] == [(1, 1, 4), (4, 4, 4), (4, 4, 4)]
    assert tree["kept"] == [(1, 1, 4), (3, 3, 3)]
    assert tree["carried_key.0"] == [(1, 1, 4), (2, 2, 2), (1, 4, 8), (16, 16, 16)], "the step before may have had any size"
    assert prefill["carried_key.0"] == [(1, 1, 1), (2, 2, 2), (1, 1, 1), (16, 16, 16)]
    assert tree["past_key.0"] == [(1, 1, 4), (2, 2, 2), (280, 280, 280), (16, 16, 16)]
    assert heads.profiles == ({"B": (1, 1, 4)},)


def test_what_is_there_is_refused_kept_or_replaced(bundle: Path, made: type[FakeTensorRT]) -> None:
    build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    first = state(bundle)
    with pytest.raises(BundleExistsError):
        build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    [kept] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]), resume=True)
    assert kept["kept"]
    assert kept["seconds"] == 0
    assert state(bundle) == first
    [other] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1, 8]), resume=True)
    assert not other["kept"], "other profiles: another engine"
    made.version = "2.0"
    [newer] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1, 8]), resume=True)
    assert not newer["kept"], "another version of the builder"
    [forced] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1, 8]), force=True)
    assert not forced["kept"]
    open_bundle(bundle)


@pytest.mark.parametrize(
    "error", [EngineError("no"), EngineMemoryError("no memory"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failed_build_leaves_the_bundle_as_it_was(bundle: Path, made: type[FakeTensorRT], error: BaseException) -> None:
    build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    before = state(bundle)

    def fail(_target: str) -> None:
        raise error

    made.during = staticmethod(fail)
    for target in ("sm_89", "sm_86"):
        with pytest.raises((DeployError, KeyboardInterrupt)):
            build_engines(bundle, [target], EngineOptions(rows=[1]), force=True)
    assert state(bundle) == before


def test_two_builders_do_not_meet(bundle: Path, made: type[FakeTensorRT]) -> None:
    met: list[BaseException] = []

    def second(_target: str) -> None:
        with pytest.raises(BundleBusyError) as caught:
            build_engines(bundle, ["sm_86"], EngineOptions(rows=[1]))
        met.append(caught.value)

    made.during = staticmethod(second)
    build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    assert len(met) == 2, "once for the step and once for the heads"
    made.during = staticmethod(lambda _target: None)
    build_engines(bundle, ["sm_86"], EngineOptions(rows=[1]))


def test_a_bundle_that_was_tampered_with_is_not_built(bundle: Path, made: type[FakeTensorRT]) -> None:
    path = bundle / "onnx" / "step.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError):
        build_engines(bundle, ["sm_89"])
    with pytest.raises(BundleError, match="doesn't exist"):
        build_engines(bundle.parent / "nothing", ["sm_89"])


def test_engines_built_from_other_files_or_options_are_not_kept(bundle: Path, made: type[FakeTensorRT]) -> None:
    def kept(**options: Any) -> bool:
        [report] = build_engines(bundle, ["sm_89"], EngineOptions(**options), resume=True)
        return bool(report["kept"])

    assert not kept()
    assert kept()
    assert not kept(precision="int8")
    assert kept(precision="int8")
    assert not kept(precision="int8", features=("weight-streaming",))
    weights = bundle / "onnx" / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[2:] + data[:2])
    manifest = open_bundle(bundle, check_hashes=False).manifest
    entry = replace(manifest.files["onnx/weights.bin"], sha256=sha256(weights))
    write_manifest(bundle, replace(manifest, files={**manifest.files, "onnx/weights.bin": entry}))
    assert not kept(precision="int8", features=("weight-streaming",)), "the weights were exchanged"


def test_a_plan_that_was_tampered_with_is_refused_not_kept(bundle: Path, made: type[FakeTensorRT]) -> None:
    build_engines(bundle, ["sm_89"])
    plan = bundle / "engines" / "sm_89" / "step.plan"
    plan.write_bytes(plan.read_bytes()[::-1])
    with pytest.raises(BundleIntegrityError, match="step.plan"):
        build_engines(bundle, ["sm_89"], resume=True)


def test_an_int8_network_is_made_once_and_is_gone_afterwards(bundle: Path, made: type[FakeTensorRT]) -> None:
    [first, second] = build_engines(bundle, ["sm_89", "sm_86"], EngineOptions(precision="int8"))
    graphs = {request.graph for request in made.requests}
    assert len(graphs) == 2
    assert not any(bundle / "onnx" in Path(graph).parents for graph in graphs)
    assert not any(Path(graph).exists() for graph in graphs)
    assert first["record"].precision == second["record"].precision == "int8"
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == ["sm_86", "sm_89"]


def test_what_a_killed_build_left_is_removed_by_the_next(bundle: Path, made: type[FakeTensorRT]) -> None:
    left = [bundle / "engines" / name for name in (".sm_120.partial-x", ".network.partial-y", ".sm_89.replaced")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"half of them")
    build_engines(bundle, ["sm_86"])
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"precision": "int3"}, "int3"), ({"weights": "elsewhere"}, "elsewhere"),
        ({"weights": "streamed", "precision": "int8"}, "inputs"),
        ({"rows": [64]}, "1 to 16"), ({"features": ("hardware-compatible",)}, "hardware-compatible"),
        ({"timing_cache": Path("cache")}, "timing-cache"), ({"features": ("refittable",)}, "sm_89"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_before_it_starts(
    bundle: Path, made: type[FakeTensorRT], options: dict[str, Any], word: str
) -> None:
    before = state(bundle)
    with pytest.raises(UsageError, match=word) as caught:
        build_engines(bundle, ["sm_89"], EngineOptions(**options))
    assert caught.value.hint
    assert not made.requests
    assert state(bundle) == before


def test_a_weight_that_is_not_finite_is_refused_by_name(bundle: Path, made: type[FakeTensorRT]) -> None:
    weights = bundle / "onnx" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[10:12] = b"\x00\x7e"  # NaN in fp16
    weights.write_bytes(data)
    manifest = open_bundle(bundle, check_hashes=False).manifest
    entry = replace(manifest.files["onnx/weights.bin"], sha256=sha256(weights))
    write_manifest(bundle, replace(manifest, files={**manifest.files, "onnx/weights.bin": entry}))
    before = state(bundle)
    with pytest.raises(QuantisationError, match="the weight w: channel 5"):
        build_engines(bundle, ["sm_89"], EngineOptions(precision="int8"))
    assert state(bundle) == before


def test_a_bundle_without_the_device_graph_is_refused(bundle: Path, made: type[FakeTensorRT]) -> None:
    manifest = open_bundle(bundle).manifest
    variants = {name: path for name, path in manifest.variants.items() if name != "device"}
    write_manifest(bundle, replace(manifest, variants=variants))
    with pytest.raises(UsageError, match="no device graph") as caught:
        build_engines(bundle, ["sm_89"])
    assert "export it again" in caught.value.hint


def test_here_is_the_gpu_of_this_machine(bundle: Path, made: type[FakeTensorRT], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "resolve_target", lambda target: "sm_86" if target == "here" else target)
    [report] = build_engines(bundle, ["here", "sm_86"])
    assert report["target"] == report["record"].target == "sm_86"


def test_a_bundle_in_fp32_is_refused(tmp_path: Path, made: type[FakeTensorRT]) -> None:
    with pytest.raises(UsageError, match="float32") as caught:
        build_engines(write_stub_bundle(tmp_path / "bundle"), ["sm_89"])
    assert "--dtype fp16" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"record_version": RECORD_VERSION + 1}, {"profiles": [{}]}, {"inputs": [{"name": "x"}]}, {"surprise": 1}, {"plan": ...},
        {"profiles": [{"name": "p", "rows": [8, 1, 1], "logit_rows": [1] * 3, "slots": [1] * 3, "columns": [1] * 3,
                       "carried": [1] * 3}]},
    ],
)  # fmt: skip
def test_a_broken_record_is_refused(bundle: Path, made: type[FakeTensorRT], change: dict[str, Any]) -> None:
    build_engines(bundle, ["sm_89"], EngineOptions(rows=[1]))
    raw = json.loads((bundle / "engines" / "sm_89" / "engine.json").read_text())
    assert parse_engine_record(json.dumps(raw)).to_json() == (bundle / "engines" / "sm_89" / "engine.json").read_text()
    old = {name: value for name, value in raw.items() if name not in ("variant", "features", "sources", "versions", "logs")}
    old["profiles"] = [{name: value for name, value in entry.items() if name != "carried"} for entry in raw["profiles"]]
    upgraded = parse_engine_record(json.dumps({**old, "record_version": 1}))
    assert (upgraded.variant, upgraded.profiles[1].carried, upgraded.sources) == ("standard", (1, 1, 1), {})
    changed = {name: value for name, value in {**raw, **change}.items() if value is not ...}
    with pytest.raises(BundleSchemaError):
        parse_engine_record(json.dumps(changed))


def test_a_record_of_the_version_before_int4_and_fp8_is_read(bundle: Path, made: type[FakeTensorRT]) -> None:
    [report] = build_engines(bundle, ["sm_89"], EngineOptions(rows=[1], precision="int8"))
    old = json.loads(report["record"].to_json())
    old |= {"record_version": 4, "int8": {"heads": "fp16"}}
    del old["quantised"]
    for log in old["logs"].values():
        del log["kernels"], log["constants"]
    for profile in old["profiles"]:
        del profile["head_rows"]
    read = parse_engine_record(json.dumps(old))
    assert (read.quantised, read.record_version) == ({"heads": "fp16"}, RECORD_VERSION)
    assert {profile.head_rows for profile in read.profiles} == {(1, 1, 1)} and not read.logs["step.plan"].kernels
