"""Planned sizes against files of real builds and of the real model's bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet
from medusa_deploy.runtime.files.heads_file import write_heads
from medusa_deploy.tools.sizing.deployment import plan_deployment
from medusa_deploy.tools.sizing.source import source_of_bundle, source_of_model
from support.families import Family, make_family

HIDDEN, VOCAB, DRAFT, ROWS = 512, 8192, 1024, (1, 8, 16)
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8}


def make_bundle(folder: Path, *, tied: bool) -> Bundle:
    """A small fp16 Llama whose weights outweigh the kernels of its engine, with grounded heads over a draft vocabulary."""
    from medusa_deploy.export.exporter import export_bundle

    model = make_family(Family("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": tied}), folder / "model")
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {"token_map": np.arange(0, VOCAB, VOCAB // DRAFT)}
    for head in range(2):
        tensors[f"head.{head}.layer.0.weight"] = rng.normal(0, 0.02, (HIDDEN, 2 * HIDDEN)).astype(np.float16)
        tensors[f"head.{head}.layer.0.bias"] = rng.normal(0, 0.02, HIDDEN).astype(np.float16)
    write_heads(HeadSet(HeadConfig("grounded", 2, 1, HIDDEN, DRAFT, "pruned"), tensors), folder / "heads")
    options = {"dtype": "fp16", "capacity": 128, "top_k": 4, "max_rows": ROWS[-1], "prefill_chunk": 32}
    export_bundle(model, folder / "heads", folder / "bundle", **options)  # type: ignore[arg-type]
    return open_bundle(folder / "bundle")


def check_weights(bundle: Bundle, planned: int) -> None:
    """The standard graph reads the planned bytes: its files also hold what only the CPU's graph reads."""
    import onnx

    graph = onnx.load(bundle.path(bundle.manifest.variants["standard"]), load_external_data=False).graph
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer if tensor.external_data]
    read = sum({(place["location"], place["offset"]): int(place["length"]) for place in places}.values())
    assert read == pytest.approx(planned, rel=0.001), "vectors below 1 KiB stay in the graph"


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_engine_is_as_large_as_planned(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from medusa_deploy.export.engines.build import build_engines
    from medusa_deploy.export.engines.options import EngineOptions

    bundle = make_bundle(tmp_path, tied=tied)
    from_model = plan_deployment(
        model=tmp_path / "model", rows=ROWS, heads=f"pruned:{DRAFT}", num_heads=2, head_kind="grounded", capacity=128
    )
    plan = plan_deployment(bundle=bundle.folder, rows=ROWS)
    weights = from_model.bytes.backbone + from_model.bytes.heads
    assert plan.bytes.backbone + plan.bytes.heads == pytest.approx(weights, rel=0.001)
    check_weights(bundle, weights)
    [built] = build_engines(bundle.folder, ["sm_89"], EngineOptions(rows=ROWS))
    size = (Path(built["folder"]) / "step.plan").stat().st_size
    smallest, largest = plan.plan_bytes
    assert smallest <= size <= largest


@pytest.mark.model
def test_the_real_model_and_its_bundle_are_as_large_as_planned() -> None:
    pytest.importorskip("transformers")
    from medusa_deploy.tools.making.demo_bundle import HEADS, ensure_bundle

    root = Path(__file__).parents[3]
    bundle = open_bundle(ensure_bundle(root / "build", root / HEADS), check_hashes=False)
    plan = plan_deployment(bundle=bundle.folder)
    preset = plan_deployment(
        size="smollm2-135m", heads="pruned:8192", head_kind="grounded", capacity=2048, batch=8, rows=plan.rows
    )
    assert source_of_model(root / "build" / "smollm2").backbone.parameters == preset.parameters == 134_515_008
    assert source_of_bundle(bundle.folder).backbone.shape.tied
    assert plan.bytes.backbone == pytest.approx(preset.bytes.backbone, rel=1e-4)
    assert plan.bytes.heads == preset.bytes.heads
    maps = 8 * 8192
    check_weights(bundle, 2 * (plan.bytes.backbone + plan.bytes.heads - maps) + maps)  # the bundle is fp32
