"""TensorRT-RTX itself: graphs parse, engines build without a GPU, and their plans are what was asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.engines.build import build_engines
from medusa_deploy.export.engines.builder_process import BuildRequest, BuiltPlan, build_plan
from medusa_deploy.export.engines.network import network_source, weights_bytes
from medusa_deploy.export.engines.options import EngineOptions, profiles_for, step_axes, step_sizes
from medusa_deploy.export.engines.tensorrt import TensorRT
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import EngineError, UsageError
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from medusa_deploy.runtime.files.engine_record import parse_engine_record
from medusa_deploy.runtime.files.heads import HeadConfig, HeadKind, HeadSet
from medusa_deploy.runtime.files.heads_file import write_heads
from support.families import Family, make_family

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]

HIDDEN, VOCAB, DRAFT, LAYERS, CHUNK = 256, 512, 128, 2, 32
SIZES = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def make_heads(folder: Path, kind: HeadKind) -> Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {"token_map": np.arange(0, VOCAB, VOCAB // DRAFT)}
    for head in range(3):
        width = 2 * HIDDEN if kind == "grounded" else HIDDEN
        tensors[f"head.{head}.layer.0.weight"] = rng.normal(0, 0.02, (HIDDEN, width)).astype(np.float16)
        tensors[f"head.{head}.layer.0.bias"] = rng.normal(0, 0.02, HIDDEN).astype(np.float16)
    write_heads(HeadSet(HeadConfig(kind, 3, 1, HIDDEN, DRAFT, "pruned"), tensors), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny fp16 Qwen3 (norms, wide heads) with grounded heads over a draft vocabulary."""
    folder = tmp_path_factory.mktemp("tensorrt")
    model = make_family(Family("Qwen3Config", SIZES), folder / "model")
    heads = make_heads(folder / "heads", "grounded")
    options = {"dtype": "fp16", "capacity": 128, "batch": 2, "top_k": 4, "max_rows": 16, "prefill_chunk": CHUNK}
    export_bundle(model, heads, folder / "bundle", **options)  # type: ignore[arg-type]
    return open_bundle(folder / "bundle")


def build_step(bundle: Bundle, target: str, graph: Path, output: Path, rows: int) -> BuiltPlan:
    """The step's plan alone, with one profile."""
    [_, profile] = profiles_for(bundle.manifest, [rows])
    request = BuildRequest("tensorrt-rtx", target, str(graph), str(output), step_axes(LAYERS), (step_sizes(profile),))
    return build_plan(request, lambda *_step: True)


def test_the_step_graph_updates_its_caches_in_place(bundle: Bundle) -> None:
    graph = TensorRT("tensorrt-rtx").parse(bundle.path(bundle.manifest.variants["device"]))
    network = graph._network
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    assert layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert {tensor.name for tensor in graph.inputs} > set(step_io.past_names(LAYERS))
    assert {tensor.name for tensor in graph.outputs} > set(step_io.present_names(LAYERS))


def test_an_engine_is_built_for_an_rtx_4090_class_gpu(bundle: Bundle) -> None:
    seen: list[tuple[str, int, int]] = []

    def advance(*step: Any) -> bool:
        seen.append(step)
        return True

    [built] = build_engines(bundle.folder, ["sm_89"], EngineOptions(rows=[1, 8]), advance=advance)
    opened = open_bundle(bundle.folder)
    record = parse_engine_record(opened.path(opened.manifest.engines["sm_89"]).read_bytes())
    folder = Path(built["folder"])
    assert {step[1:] for step in seen} >= {(0, 3), (1, 3), (2, 3), (3, 3)}, "the builder's progress is told by profile"
    assert [profile.name for profile in record.profiles] == ["prefill", "rows-1", "rows-8"]
    assert record.graph_sha256 == opened.manifest.files["onnx/step.device.onnx"].sha256
    caches = {tensor.name: tensor for tensor in record.inputs if tensor.name.startswith("past_")}
    assert len(caches) == 2 * LAYERS
    assert {tensor.dtype for tensor in caches.values()} == {"float16"}
    assert {name.replace("past", "present") for name in caches} < {tensor.name for tensor in record.outputs}
    carried = [tensor for tensor in record.inputs if tensor.name.startswith("carried_")]
    assert {tensor.shape for tensor in carried} == {(-1, 2, -1, 64)}
    assert {"emitted", "next_tokens", "next_kept_count", "new_value.1"} <= {tensor.name for tensor in record.outputs}
    log = record.logs[record.plan]
    assert log.attention_calls == LAYERS * len(record.profiles), "attention is fused in every layer, in every profile"
    assert log.plan_bytes == (folder / record.plan).stat().st_size
    assert log.peak_rss_bytes > log.plan_bytes
    assert not [warning for warning in record.warnings if "Int64" not in warning]
    assert (folder / record.heads_plan).stat().st_size > 10_000
    [kept] = build_engines(bundle.folder, ["sm_89"], EngineOptions(rows=[1, 8]), resume=True)
    assert kept["kept"]


@pytest.mark.parametrize(("config", "fused"), [("MistralConfig", LAYERS), ("Gemma2Config", 0)])
def test_windows_and_soft_caps_build(config: str, fused: int, tmp_path: Path) -> None:
    """TensorRT's attention takes a mask of any form and no soft cap: Gemma 2's is taken apart."""
    model = make_family(Family(config, {**SIZES, "sliding_window": 16}), tmp_path / "model")
    export_bundle(model, None, tmp_path / "bundle", dtype="fp16", capacity=128, top_k=4, max_rows=16, prefill_chunk=CHUNK)
    build_engines(tmp_path / "bundle", ["sm_89"], EngineOptions(rows=[8]))
    opened = open_bundle(tmp_path / "bundle")
    record = parse_engine_record(opened.path(opened.manifest.engines["sm_89"]).read_bytes())
    assert record.logs[record.plan].attention_calls == fused * len(record.profiles)


def test_a_stopped_build_leaves_the_bundle_as_it_was(bundle: Bundle) -> None:
    before = (bundle.folder / "manifest.json").read_bytes()
    with pytest.raises(EngineError, match="was stopped"):
        build_engines(bundle.folder, ["sm_86"], EngineOptions(rows=[1]), advance=lambda *_step: False)
    assert (bundle.folder / "manifest.json").read_bytes() == before
    assert not list((bundle.folder / "engines").glob("*86*"))


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_int8_weights_are_stored_in_8_bits(bundle: Bundle, target: str, tmp_path: Path) -> None:
    saved = weights_bytes(bundle, "fp16") - weights_bytes(bundle, "int8")
    assert saved > 1_500_000
    plans = {}
    for precision in ("fp16", "int8"):
        (tmp_path / precision).mkdir()
        with network_source(bundle, precision, "inside", tmp_path / precision) as source:
            built = build_step(bundle, target, source.step, tmp_path / f"{precision}.plan", rows=4)
        plans[precision] = built.log.plan_bytes
        assert built.log.attention_calls == LAYERS
    # The heads' weights, which are counted in saved, are in both plans: a fifth of them.
    assert plans["fp16"] - plans["int8"] > 0.6 * saved


def test_an_int8_engine_holds_its_weights_once(bundle: Bundle) -> None:
    sizes = {}
    for precision in ("fp16", "int8"):
        [built] = build_engines(bundle.folder, ["sm_89"], EngineOptions(precision=precision, rows=[1, 8]), force=True)
        sizes[precision] = sum(built["record"].logs["step.plan"].constants.values())
        assert built["record"].precision == precision
    saved = weights_bytes(bundle, "fp16") - weights_bytes(bundle, "int8")
    assert sizes["fp16"] - sizes["int8"] > 0.5 * saved, "a second copy would take most of what was saved"


def test_an_operator_that_it_has_not_is_named(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="GroupQueryAttention node_"):
        TensorRT("tensorrt-rtx").parse(bundle.path(bundle.manifest.variants["cpu"]))


def test_a_graph_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="can't parse broken.onnx"):
        TensorRT("tensorrt-rtx").parse(path)


def test_targets_are_those_of_the_package() -> None:
    found = TensorRT("tensorrt-rtx")
    assert {"sm_80", "sm_86", "sm_89", "sm_120", "here"} <= set(found.targets)
    with pytest.raises(UsageError, match="sm_90") as caught:
        found.check_target("sm_90")
    assert "sm_89" in caught.value.hint
