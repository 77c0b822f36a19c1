"""What inspect says about a bundle, and which bundles it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_deploy.runtime import Session
from medusa_deploy.tools.cli import USER_ERROR, main
from medusa_deploy.tools.verbs.inspect import inspect_bundle
from support.records import write_stub_bundle


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A bundle of a few bytes."""
    return write_stub_bundle(tmp_path / "bundle")


def test_the_report_holds_sizes_limits_and_trees(stub: Path) -> None:
    report = inspect_bundle(stub)
    assert report["bytes"] == sum(path.stat().st_size for path in (stub / "onnx").iterdir())
    assert report["backbone"]["layers"] == 2
    assert report["trees"] == {"default": {"rows": 4, "depth": 3}}
    names = ("heads.onnx", "step.cpu.onnx", "step.device.onnx", "step.onnx", "weights.bin")
    assert set(report["files"]) == {f"onnx/{name}" for name in names}
    assert report["cache_bytes"] == 4 * report["cache_bytes_per_slot"]
    assert report["hashes_checked"]


def test_cache_memory_is_what_the_executor_allocates(tiny_bundle: Path, tiny_session: Session) -> None:
    assert inspect_bundle(tiny_bundle)["cache_bytes_per_slot"] == tiny_session.executor.caches.nbytes  # type: ignore[attr-defined]


def test_the_text_names_what_a_person_asks_for(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "LlamaForCausalLM, 2 layers, hidden 64, 4 heads / 2 kv, vocabulary 128, float32",
        "3 medusa, top-4 of 128 tokens, shared projection",
        "capacity 256, 4 slots, trees up to 16 rows, prefill chunk 16",
        "none: token ids in and out",
        "checked against the torch module: cpu: max logit error",
        "default *",
        "onnx/weights.bin",
        "sha256 checked",
    ):
        assert expected in shown


def test_json_goes_to_a_file_beside_the_text(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stub), "--json", str(tmp_path / "report.json")]) == 0
    assert capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == json.loads(json.dumps(inspect_bundle(stub)))


def test_a_changed_file_is_found_by_its_hash_only(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stub / "onnx" / "weights.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert main(["inspect", str(stub)]) == USER_ERROR
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "onnx/weights.bin has sha256" in shown.err
    assert "hint: " in shown.err
    assert main(["inspect", str(stub), "--no-hashes"]) == 0
    assert "sha256 not checked" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_found_without_hashes(fault: str, stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stub / "onnx" / "step.onnx"
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(stub), "--no-hashes"]) == USER_ERROR
    assert "onnx/step.onnx" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == USER_ERROR
    assert "has no manifest.json" in capsys.readouterr().err


def test_an_engine_is_told_with_its_plans(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    from support.fake_engine import add_fake_engine

    add_fake_engine(bundle_copy, packed=True)
    add_fake_engine(bundle_copy, target="sm_86")
    engines = inspect_bundle(bundle_copy)["engines"]
    packed = engines["sm_89"]["plans"]["step.plan.xz"]
    assert packed["compression"] == "xz" and packed["stored_bytes"] < packed["plan_bytes"]
    plain = engines["sm_86"]["plans"]["step.plan"]
    assert plain["compression"] is None and plain["stored_bytes"] == plain["plan_bytes"] == packed["plan_bytes"]
    assert main(["inspect", str(bundle_copy)]) == 0
    shown = capsys.readouterr().out
    assert "engine sm_89: tensorrt 9.9, fp16, weights inside; step.plan.xz" in shown and ", unpacked " in shown
    record = bundle_copy / "engines" / "sm_86" / "engine.json"
    record.write_text(record.read_text().replace('"record_version": 1', '"record_version": 9'))
    assert main(["inspect", str(bundle_copy), "--no-hashes"]) == 0
    assert "engine sm_86: engine.json has version 9" in capsys.readouterr().out
