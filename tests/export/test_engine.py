"""Engines in a bundle: profiles, the commit, what stays and what is refused; the builder itself is a fake one here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_deploy.export import tensorrt
from medusa_deploy.export.engine import build_engines, default_rows, profiles_for
from medusa_deploy.runtime.bundle import open_bundle
from medusa_deploy.runtime.engine_record import RECORD_VERSION, TensorRecord, parse_engine_record
from medusa_deploy.runtime.errors import (
    BundleBusyError,
    BundleError,
    BundleExistsError,
    BundleSchemaError,
    DeployError,
    EngineError,
    MissingDependencyError,
    UsageError,
)
from support.fake_tensorrt import FakeGraph, FakeTensorRT, fake_tensorrt, half_precision_bundle, state
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


@pytest.mark.parametrize(("rows", "prefill"), [([], None), ([0], None), ([41], None), ([1], 15), ([1], 257)])
def test_sizes_that_the_bundle_does_not_allow_are_refused(rows: list[int], prefill: int | None) -> None:
    with pytest.raises(UsageError):
        profiles_for(manifest(max_rows=40, prefill_chunk=16), rows, prefill)


def test_engines_are_added_to_the_bundle(bundle: Path, made: type[FakeTensorRT]) -> None:
    before = state(bundle)
    reports = build_engines(bundle, ["sm_89", "sm_86", "sm_89"], rows=[1, 8])
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
    assert {name: data for name, data in state(bundle).items() if name in before and name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


def test_shapes_follow_the_axes(bundle: Path, made: type[FakeTensorRT], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[FakeGraph] = []
    parse = FakeTensorRT.parse
    monkeypatch.setattr(made, "parse", lambda self, path: graphs.append(parse(self, path)) or graphs[-1])
    build_engines(bundle, ["sm_89"], rows=[8])
    step, heads = graphs
    tree = step.profiles[1]
    assert tree["ancestors"] == [(1, 1, 4), (8, 8, 8), (8, 8, 8)]
    assert tree["kept"] == [(1, 1, 4), (3, 3, 3)]
    assert tree["carried_key.0"] == [(1, 1, 4), (2, 2, 2), (1, 8, 8), (16, 16, 16)]
    assert step.profiles[0]["carried_key.0"] == [(1, 1, 1), (2, 2, 2), (1, 1, 1), (16, 16, 16)]
    assert tree["past_key.0"] == [(1, 1, 4), (2, 2, 2), (280, 280, 280), (16, 16, 16)]
    assert heads.profiles == [{"hidden": [(1, 1, 4), (64, 64, 64)], "root": [(1, 1, 4)]}]


def test_what_is_there_is_refused_kept_or_replaced(bundle: Path, made: type[FakeTensorRT]) -> None:
    build_engines(bundle, ["sm_89"], rows=[1])
    first = state(bundle)
    with pytest.raises(BundleExistsError):
        build_engines(bundle, ["sm_89"], rows=[1])
    [kept] = build_engines(bundle, ["sm_89"], rows=[1], resume=True)
    assert kept["kept"]
    assert kept["seconds"] == 0
    assert state(bundle) == first
    [other] = build_engines(bundle, ["sm_89"], rows=[1, 8], resume=True)
    assert not other["kept"], "other profiles: another engine"
    made.version = "2.0"
    [newer] = build_engines(bundle, ["sm_89"], rows=[1, 8], resume=True)
    assert not newer["kept"], "another version of the builder"
    [forced] = build_engines(bundle, ["sm_89"], rows=[1, 8], force=True)
    assert not forced["kept"]
    open_bundle(bundle)


@pytest.mark.parametrize("error", [EngineError("no memory"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_build_leaves_the_bundle_as_it_was(bundle: Path, made: type[FakeTensorRT], error: BaseException) -> None:
    build_engines(bundle, ["sm_89"], rows=[1])
    before = state(bundle)

    def fail(_target: str) -> None:
        raise error

    made.during = staticmethod(fail)
    for target in ("sm_89", "sm_86"):
        with pytest.raises((DeployError, KeyboardInterrupt)):
            build_engines(bundle, [target], rows=[1], force=True)
    assert state(bundle) == before


def test_two_builders_do_not_meet(bundle: Path, made: type[FakeTensorRT]) -> None:
    met: list[BaseException] = []

    def second(_target: str) -> None:
        with pytest.raises(BundleBusyError) as caught:
            build_engines(bundle, ["sm_86"], rows=[1])
        met.append(caught.value)

    made.during = staticmethod(second)
    build_engines(bundle, ["sm_89"], rows=[1])
    assert len(met) == 2, "once for the step and once for the heads"
    made.during = staticmethod(lambda _target: None)
    build_engines(bundle, ["sm_86"], rows=[1])


def test_a_bundle_that_was_tampered_with_is_not_built(bundle: Path, made: type[FakeTensorRT]) -> None:
    path = bundle / "onnx" / "step.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError):
        build_engines(bundle, ["sm_89"])
    with pytest.raises(BundleError, match="doesn't exist"):
        build_engines(bundle.parent / "nothing", ["sm_89"])


def test_a_bundle_in_fp32_is_refused(tmp_path: Path, made: type[FakeTensorRT]) -> None:
    with pytest.raises(UsageError, match="float32") as caught:
        build_engines(write_stub_bundle(tmp_path / "bundle"), ["sm_89"])
    assert "--dtype fp16" in caught.value.hint


def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(tensorrt, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(MissingDependencyError, match="no tensorrt_rtx") as caught:
        tensorrt.TensorRT("tensorrt-rtx")
    assert "medusa-deploy[tensorrt-rtx]" in caught.value.hint
    with pytest.raises(UsageError):
        tensorrt.TensorRT("tensorflow")


@pytest.mark.parametrize(
    "change",
    [
        {"record_version": RECORD_VERSION + 1}, {"profiles": [{}]}, {"inputs": [{"name": "x"}]}, {"surprise": 1}, {"plan": ...},
        {"profiles": [{"name": "p", "rows": [8, 1, 1], "logit_rows": [1] * 3, "slots": [1] * 3, "columns": [1] * 3,
                       "carried": [1] * 3}]},
    ],
)  # fmt: skip
def test_a_broken_record_is_refused(bundle: Path, made: type[FakeTensorRT], change: dict[str, Any]) -> None:
    build_engines(bundle, ["sm_89"], rows=[1])
    raw = json.loads((bundle / "engines" / "sm_89" / "engine.json").read_text())
    assert parse_engine_record(json.dumps(raw)).to_json() == (bundle / "engines" / "sm_89" / "engine.json").read_text()
    changed = {name: value for name, value in {**raw, **change}.items() if value is not ...}
    with pytest.raises(BundleSchemaError):
        parse_engine_record(json.dumps(changed))
