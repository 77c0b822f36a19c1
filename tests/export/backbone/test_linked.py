"""Linked weights: the bundle's graphs read the checkpoint's own safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from medusa_deploy.export import estimate
from medusa_deploy.export.backbone import checkpoint
from medusa_deploy.export.backbone.linked import stored_parameters
from medusa_deploy.export.backbone.safetensors_header import read_header
from medusa_deploy.export.estimate import plan_export
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.proof import linked_check
from medusa_deploy.export.proof.linked_check import check_places
from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import CheckpointError, ExportMismatchError, UnlinkableError
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.session import Session
from support.families import FAMILIES, make_family
from support.tiny import HEADS, HIDDEN

pytestmark = pytest.mark.slow  # each export of this kind traces twice

OPTIONS: dict[str, Any] = {"capacity": 64, "batch": 2, "top_k": 4, "max_rows": 8, "prefill_chunk": 16}


@pytest.fixture(scope="module")
def bundle(sharded: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, linked from two shards."""
    output = tmp_path_factory.mktemp("linked") / "bundle"
    export_bundle(sharded, tiny_heads, output, weights="linked", **OPTIONS)
    return output


def generated(session: Session) -> list[int]:
    return session.generate(token_ids=[5, 9, 17, 40], max_new_tokens=24).token_ids


def test_a_linked_bundle_generates_what_a_copied_one_does(bundle: Path, tiny_session: Session) -> None:
    assert generated(load(bundle, threads=1)) == generated(tiny_session)


def test_the_rules_that_are_left_out_would_change_nothing(
    bundle: Path, sharded: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxscript import optimizer

    from medusa_deploy.export.trace import link

    monkeypatch.setattr(link, "optimise", lambda model, keeps: optimizer.optimize_ir(model, should_fold=keeps))
    export_bundle(sharded, tiny_heads, tmp_path / "bundle", weights="linked", **OPTIONS)
    graphs = sorted(path.name for path in (bundle / "onnx").glob("*.onnx"))
    assert len(graphs) == 5 + len(step_io.PACKED_SLOTS)
    for name in graphs:
        assert (tmp_path / "bundle" / "onnx" / name).read_bytes() == (bundle / "onnx" / name).read_bytes()


def test_the_weights_are_the_checkpoints_own_files(bundle: Path, sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) == 2
    for name in shards:
        assert (bundle / "onnx" / name).samefile(sharded / name)
    manifest = open_bundle(bundle).manifest
    heads = HEADS * HIDDEN * HIDDEN * (4 + 1 + 4 / 32)  # in float32, and in 8 bits with scales
    tables = manifest.limits.cache_rows * manifest.backbone.head_dim * 4  # halves of cos and sin
    stored = (bundle / "onnx" / "weights.bin").stat().st_size
    assert stored < heads + tables + (HEADS + 4) * 65536, "weights.bin holds the heads and the rotation's tables alone"
    weights = manifest.provenance["weights"]
    assert weights["kind"] == "linked"
    assert weights["files"] == dict.fromkeys(shards, "hard link")
    assert weights["places"]["device"] == {"tensors": 20, "layers": 2}
    assert not list((bundle / "onnx").glob("check.*")), "the graphs of the check are gone"


def test_files_are_copied_where_there_are_no_hard_links(
    sharded: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    placed = checkpoint.place(stored_parameters(sharded, "fp32", 64)[1], torch.float32, tmp_path, lambda _phase: None)
    assert set(placed.files.values()) == {"copy"}
    for name in placed.files:
        assert (tmp_path / name).read_bytes() == (sharded / name).read_bytes()


@pytest.mark.parametrize("name", ["qwen2: tied, QKV bias", "phi3: fused QKV, partial rotary"])
def test_other_families_are_linked_and_their_first_layers_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linked_check, "WHOLE_BYTES", 0)
    monkeypatch.setattr(estimate, "COPIED_BYTES", 0)
    model = make_family(FAMILIES[name], tmp_path / "model")
    report = export_bundle(model, None, tmp_path / "bundle", **OPTIONS)
    assert report["weights"]["kind"] == "linked"
    assert report["weights"]["checked_layers"] == 2
    assert all(check["argmax_agreement"] == 1 for check in report["check"].values())


def test_another_type_is_converted_a_chunk_at_a_time(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in load_file(model / "model.safetensors").items()}
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, model / "model.safetensors")
    report = export_bundle(model, tiny_heads, tmp_path / "bundle", dtype="fp16", weights="linked", **OPTIONS)
    assert report["weights"]["files"] == {"model.safetensors": "converted to F16"}
    converted = load_file(tmp_path / "bundle" / "onnx" / "model.safetensors")
    assert all(np.array_equal(converted[name], tensors[name].half().numpy()) for name in converted)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_torch(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="norm.weight holds NaN or infinite values as F16"):
        export_bundle(model, None, tmp_path / "other", dtype="fp16", weights="linked", **OPTIONS)


def test_small_backbones_are_copied_unless_linking_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    assert export_bundle(tiny_model, None, tmp_path / "bundle", **OPTIONS)["weights"] == {"kind": "copied"}
    assert plan_export(tiny_model, None, dtype="fp32").linked_bytes == 0


def test_what_cannot_be_linked_is_copied(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in torch's own format, and older names that transformers converts."""
    monkeypatch.setattr(estimate, "COPIED_BYTES", 0)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): array for name, array in tensors.items()}, model / "model.safetensors")
    with pytest.raises(UnlinkableError, match="lacks"):
        export_bundle(model, None, tmp_path / "bundle", weights="linked", **OPTIONS)
    report = export_bundle(model, None, tmp_path / "bundle", **OPTIONS)
    assert report["weights"] == {"kind": "copied"}
    assert plan_export(model, None, dtype="fp32").linked_bytes == 0
    (model / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, model / "pytorch_model.bin")
    with pytest.raises(UnlinkableError, match="neither"):
        export_bundle(model, None, tmp_path / "other", weights="linked", **OPTIONS)
    report = export_bundle(model, None, tmp_path / "other", **OPTIONS)
    assert report["weights"] == {"kind": "copied"}
    assert generated(load(tmp_path / "other", threads=1)) == generated(load(tmp_path / "bundle", threads=1))


def test_a_weight_in_the_wrong_place_fails_the_check(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle / "onnx", tmp_path / "onnx"))
    needed: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        needed |= read_header(path)
    tables = dict.fromkeys(("embedding.weight", "projection.weight", "heads.shared.weight"), "model.embed_tokens.weight")
    assert check_places(folder / "step.onnx", needed, 2, tables).layers == 2
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    one, two = (
        next(tensor for tensor in model.graph.initializer if tensor.name.endswith(f"layers.{layer}.mlp.up_proj.weight"))
        for layer in (0, 1)
    )
    places = list(one.external_data), list(two.external_data)
    del one.external_data[:], two.external_data[:]
    one.external_data.extend(places[1])
    two.external_data.extend(places[0])
    onnx.save(model, folder / "swapped.onnx")
    with pytest.raises(ExportMismatchError, match="should be its own tensor"):
        check_places(folder / "swapped.onnx", needed, 2, tables)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi"])
def test_names_of_other_families_are_linked(kind: str, tmp_path: Path) -> None:
    """Tables of positions, layers that are called h, and norms with a name of their own."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=4, vocab_size=128),
        "opt": lambda: transformers.OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64, vocab_size=128),
        "phi": lambda: transformers.PhiConfig(**sizes, intermediate_size=128, vocab_size=128),
    }
    config = configs[kind]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    export_bundle(tmp_path / "model", None, tmp_path / "bundle", weights="linked", **OPTIONS)
    places = open_bundle(tmp_path / "bundle").manifest.provenance["weights"]["places"]
    assert {found["layers"] for found in places.values()} == {2}


@pytest.mark.parametrize("whole", [0, 1 << 30], ids=["first layers", "whole"])
def test_an_export_whose_layers_are_wrong_is_not_committed(
    whole: int, sharded: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_layers = linked_check.first_layers
    monkeypatch.setattr(linked_check, "WHOLE_BYTES", whole)

    def swapped(*arguments: Any) -> Any:
        cut, real = first_layers(*arguments)
        layers = real.get_decoder().layers
        layers[0].mlp.up_proj, layers[0].mlp.gate_proj = layers[0].mlp.gate_proj, layers[0].mlp.up_proj
        return cut, real

    monkeypatch.setattr(linked_check, "first_layers", swapped)
    with pytest.raises(ExportMismatchError):
        export_bundle(sharded, tiny_heads, tmp_path / "bundle", weights="linked", **OPTIONS)
    assert not any(tmp_path.iterdir())


def test_a_dry_run_says_what_would_be_linked(sharded: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = plan_export(sharded, tiny_heads, dtype="fp32", weights="copied")
    linked = plan_export(sharded, tiny_heads, dtype="fp32", weights="linked")
    assert linked.linked_bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert copied.linked_bytes == 0
    assert plan_export(sharded, tiny_heads, dtype="fp32") == copied, "small backbones are copied"
    monkeypatch.setattr(estimate, "COPIED_BYTES", 0)
    assert plan_export(sharded, tiny_heads, dtype="fp32") == linked, "what can be linked is linked"
    assert linked.weights_bytes < copied.weights_bytes


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_large_heads_lie_in_a_file_that_all_graphs_read(
    dtype: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own projections, stored in float16: the file holds each matrix once, as the graphs' type."""
    from medusa_deploy.export.heads import linked

    rng = np.random.default_rng(3)
    tensors: dict[str, Any] = {}
    for head in range(HEADS):
        tensors[f"{head}.0.linear.weight"] = rng.normal(0, 0.1, (HIDDEN, HIDDEN)).astype(np.float16)
        tensors[f"{head}.0.linear.bias"] = np.zeros(HIDDEN, np.float16)
        tensors[f"{head}.1.weight"] = rng.normal(0, 0.1, (128, HIDDEN)).astype(np.float16)
    (tmp_path / "heads").mkdir()
    save_file(tensors, tmp_path / "heads" / "medusa_lm_head.safetensors")
    exported = {}
    for limit in (0, 1 << 30):
        monkeypatch.setattr(linked, "LINKED_BYTES", limit)
        monkeypatch.setattr(linked, "_SMALLEST", 1024)
        exported[limit] = tmp_path / f"bundle-{limit}"
        report = export_bundle(sharded, tmp_path / "heads", exported[limit], weights="linked", dtype=dtype, **OPTIONS)
        assert {check["head_agreement"] for check in report["check"].values()} == {1.0}
    files = [{path.name for path in (bundle / "onnx").iterdir()} for bundle in exported.values()]
    assert files[0] - files[1] == {linked.HEADS_FILE}
    stored = read_header(exported[0] / "onnx" / linked.HEADS_FILE)
    assert len(stored) == 2 * HEADS and {tensor.dtype for tensor in stored.values()} == {"F32" if dtype == "fp32" else "F16"}
    model = onnx.load(exported[0] / "onnx" / "step.onnx", load_external_data=False)
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
    assert sum(place.get("location") == linked.HEADS_FILE for place in places) == 2 * HEADS
    one, other = (load(bundle, threads=1) for bundle in exported.values())
    assert generated(one) == generated(other)
