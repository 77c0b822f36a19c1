from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.engine import build_engines
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.tensorrt import TensorRT
from medusa_deploy.runtime import step_io
from medusa_deploy.runtime.bundle import Bundle, open_bundle
from medusa_deploy.runtime.engine_record import parse_engine_record
from medusa_deploy.runtime.errors import EngineError, UsageError
from medusa_deploy.runtime.heads import HeadConfig, HeadKind, HeadSet
from medusa_deploy.runtime.heads_file import write_heads
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


def mha_kernels(plan: Path) -> int:
    """Fused attention kernels in a plan, by the names that it holds; a smoke test, not a contract."""
    return len(set(re.findall(rb"_gemm_mha_v2_0x[0-9a-f]+", plan.read_bytes())))


def test_the_step_graph_updates_its_caches_in_place(bundle: Bundle) -> None:
    graph = TensorRT("tensorrt-rtx").parse(bundle.path(bundle.manifest.variants["device"]))
    network = graph._network
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    assert layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert {tensor.name for tensor in graph.inputs} > set(step_io.past_names(LAYERS))
    assert {tensor.name for tensor in graph.outputs} > set(step_io.present_names(LAYERS))


def test_an_engine_is_built_for_an_rtx_4090_class_gpu(bundle: Bundle) -> None:
    seen: list[tuple[int, int, str]] = []

    def advance(*step: Any) -> bool:
        seen.append(step)
        return True

    [built] = build_engines(bundle.folder, ["sm_89"], rows=[1, 8], advance=advance)
    opened = open_bundle(bundle.folder)
    record = parse_engine_record(opened.path(opened.manifest.engines["sm_89"]).read_bytes())
    folder = Path(built["folder"])
    assert seen, "the builder said nothing of its progress"
    assert [profile.name for profile in record.profiles] == ["prefill", "rows-1", "rows-8"]
    assert record.graph_sha256 == opened.manifest.files["onnx/step.device.onnx"].sha256
    caches = {tensor.name: tensor for tensor in record.inputs if tensor.name.startswith("past_")}
    assert len(caches) == 2 * LAYERS
    assert {tensor.dtype for tensor in caches.values()} == {"float16"}
    assert {name.replace("past", "present") for name in caches} < {tensor.name for tensor in record.outputs}
    assert mha_kernels(folder / record.plan) >= 1
    assert (folder / record.heads_plan).stat().st_size > 10_000
    [kept] = build_engines(bundle.folder, ["sm_89"], rows=[1, 8], resume=True)
    assert kept["kept"]


def test_a_stopped_build_leaves_the_bundle_as_it_was(bundle: Bundle) -> None:
    before = (bundle.folder / "manifest.json").read_bytes()
    with pytest.raises(EngineError, match="was stopped"):
        build_engines(bundle.folder, ["sm_86"], rows=[1], advance=lambda *_step: False)
    assert (bundle.folder / "manifest.json").read_bytes() == before
    assert not list((bundle.folder / "engines").glob("*86*"))


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
