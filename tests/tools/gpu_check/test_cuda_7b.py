"""The stage cuda-7b on a machine without a GPU: a bundle of random weights at a tiny size, and what a GPU's trace would say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.tools.gpu_check import kernels, worker
from medusa_deploy.tools.gpu_check.machine import machine_facts
from medusa_deploy.tools.gpu_check.options import Options, parse
from medusa_deploy.tools.gpu_check.random_bundle import HEADS, heads_config, make_bundle
from medusa_deploy.tools.gpu_check.shapes import SIZES
from medusa_deploy.tools.gpu_check.stages import cuda_7b
from medusa_deploy.tools.gpu_check.table import describe_check

TINY = SIZES["tiny"]


def options_for(out: Path, *more: str) -> Options:
    return parse(["--out", str(out), "--device", "cpu", "--sizes", "tiny", "--repeats", "2", "--rows", "1,4,16", *more])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    for package in ("torch", "transformers", "onnx_ir", "onnxscript"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("cuda-7b")
    options = dataclasses.replace(options_for(out), limit=3600.0)  # a busy machine takes its time
    found = worker.run_stage("cuda-7b", options).to_json()
    assert list(out.iterdir()) in ([], [out / ".compiled"]) and not [*out.glob(".compiled/*")], "the bundle is gone"
    return json.loads(json.dumps(found))


def test_both_precisions_are_measured_beside_what_memory_bounds(stage: dict[str, Any]) -> None:
    assert (stage["status"], stage["error"], stage["wrong"]) == ("partial", None, {}), stage["skipped"]
    assert set(stage["skipped"]) == {f"{kind}, kernels of {rows} rows" for kind in ("fp16", "int8") for rows in (1, 16)}
    results = stage["results"]
    assert results["made"]["size"] == "tiny" and set(results["made"]["seconds"]) == {"prepare", "trace", "int8", "hash"}
    for precision in ("fp16", "int8"):
        entry = results[precision]
        assert set(entry["rows"]) == {"1", "4", "16"}
        for found in entry["rows"].values():
            assert found["ms"] >= found["engine_ms"] > 0 and found["finite"] and found["bound_ms"] > 0
        assert entry["nodes"]["CPUExecutionProvider"] > 100 and entry["on_cpu"]["Attention"] == TINY.model.layers
        assert entry["cuda_graph"]["captured"] is False and set(entry["cuda_graph"]["ms"]) == {"1", "4", "16"}
    assert results["int8"]["on_cpu"]["MatMulNBits"] == 7 * TINY.model.layers + HEADS + 2 - 2 * TINY.model.layers
    for n in (1, 4, 16):
        # Tokens, positions, rows with logits, ancestors; two numbers and the rows to commit; 128 visible columns.
        sent = 3 * 8 * n + n * n + 8 * (2 + HEADS) + 8 * 128
        fetched = 2 * 8 + (2 * 64 if n == 1 else HEADS * 10 * (8 + 4))  # a state to tell NaN by, or candidates
        assert results["fp16"]["rows"][str(n)]["copied_bytes"] == sent + fetched


def test_fewer_bits_have_a_lower_bound() -> None:
    memory = {"published_gb_s": 1000.0}
    half, few = (cuda_7b._bound(SIZES["7b"], precision, 1, 500, memory) for precision in ("fp16", "int8"))
    assert half["bytes"] > 2 * SIZES["7b"].step_parameters and 0.5 < few["bytes"] / half["bytes"] < 0.53
    assert half["bound_ms"] == pytest.approx(half["bytes"] / 1e9)
    assert cuda_7b._bound(SIZES["7b"], "fp16", 1, 500, {})["bound_ms"] is None


def test_the_table_shows_steps_and_bounds(stage: dict[str, Any]) -> None:
    entry = {**stage, "device": "cpu", "seconds": 1}
    said = describe_check({"machine": machine_facts(), "stages": {"cuda-7b": entry}})
    assert "cuda-7b: ms, tiny" in said and "fp16: no CUDA graph: a CPU has none" in said
    assert "bytes copied a step at most" in said and max(map(len, said.splitlines())) < 240


def test_a_bundle_of_random_weights_is_small(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    bundle, _ = make_bundle(TINY, tmp_path / "bundle")
    assert set(bundle.manifest.variants) == {"standard", "cuda-int8"}
    assert bundle.manifest.backbone.layers == TINY.model.layers and bundle.manifest.heads.num_heads == HEADS
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "bundle" / "onnx").iterdir()}
    assert sizes["random.bin"] == 2 * (64 * 128 + HEADS * (1 << 16)) and sizes["step.onnx"] < 1 << 17
    assert heads_config(SIZES["7b"]).hidden_size == 4096


def test_what_a_trace_says_of_kernels_and_copies() -> None:
    def event(kind: str, name: str, **more: Any) -> dict[str, Any]:
        return {"cat": kind, "name": name, **more}

    events = [
        event("kernel", "gemm_f16", dur=30.0),
        event("kernel", "gemm_f16", dur=20.5),
        event("kernel", "fmha_cutlassF_f16_aligned_64x64_rf_sm80", dur=4),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", dur=1, args={"bytes": 800}),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", dur=1, args={"bytes": 8}),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", dur=1, args={"bytes": 16}),
        {"name": "process_name", "ph": "M"},
    ]
    found = kernels.read_trace({"traceEvents": events})
    assert (found["kernel_calls"], found["kernel_ms"]) == (3, pytest.approx(0.0545))
    assert found["kernels"][0] == {"name": "gemm_f16", "calls": 2, "us": 50.5}
    assert [kernel["name"] for kernel in found["attention"]] == ["fmha_cutlassF_f16_aligned_64x64_rf_sm80"]
    assert found["copied_bytes"] == {"HtoD": 808, "DtoH": 16}
    assert kernels.read_trace({})["kernels"] == []


def test_on_a_gpu_the_stage_has_four_minutes(tmp_path: Path) -> None:
    lent = parse(["--out", str(tmp_path)])
    assert (lent.limit_of("cuda-7b"), lent.limit_of("curve")) == (240, 480)
    assert parse(["--out", str(tmp_path), "--limit", "60"]).limit_of("cuda-7b") == 60
    assert options_for(tmp_path).limit_of("cuda-7b") == 480
