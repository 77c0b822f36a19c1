from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from medusa_deploy.export.estimate import bundle_trees
from medusa_deploy.export.heads.layouts import ReadHeads, check_fit, read_heads
from medusa_deploy.runtime.errors import HeadsError, TreeError
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet
from medusa_deploy.runtime.files.heads_file import write_heads
from medusa_deploy.runtime.tree import chain
from support.published_heads import (
    HIDDEN,
    OUTPUT,
    VOCAB,
    Source,
    backbone_names,
    check_same,
    random_source,
    reference_names,
    save,
    save_shards,
    to_float8,
    trtllm_names,
    vllm_names,
    write_config,
)

# -- one test a layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pt-legacy"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_reference_heads(tmp_path: Path, kind: str, named: str) -> None:
    source = random_source(heads=5)
    file = tmp_path / f"medusa_lm_head.{kind.split('-', maxsplit=1)[0]}"
    if kind == "safetensors":
        save(tmp_path, file.name, reference_names(source))
    else:
        torch.save(OrderedDict(reference_names(source)), file, _use_new_zipfile_serialization=kind == "pt")
    write_config(tmp_path, base_model_name_or_path="lmsys/vicuna", medusa_num_heads=2, medusa_num_layers=1)
    read = read_heads(tmp_path if named == "folder" else file)
    assert read.layout == "a"
    assert read.warnings == ("the heads' config says medusa_num_heads 2; their tensors have 5 heads",)
    assert (read.heads.config.projection, read.heads.config.draft_vocab_size) == ("own", VOCAB)
    check_same(read, source)


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_fsdp_wrapped_module.{}"],
)
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_names_of_torchs_wrappers_are_taken_off(tmp_path: Path, wrapped: str, prefix: str) -> None:
    source = random_source()
    torch.save({wrapped.format(name): tensor for name, tensor in reference_names(source, prefix).items()}, tmp_path / "heads.pt")
    read = read_heads(tmp_path)
    assert read.layout == ("c" if prefix else "a")
    check_same(read, source)


def test_wrappers_inside_a_name_are_taken_off_and_two_names_for_one_tensor_refused(tmp_path: Path) -> None:
    source = random_source()
    tensors = {f"medusa_head._orig_mod.{name}": tensor for name, tensor in reference_names(source).items()}
    check_same(read_heads(save(tmp_path, "heads.safetensors", tensors)), source)
    twice = {**tensors, "medusa_head.0.0.linear.weight": torch.ones(HIDDEN, HIDDEN)}
    with pytest.raises(HeadsError, match="holds .* and .*"):
        read_heads(save(tmp_path, "heads.safetensors", twice))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_files_of_a_trainer_beside_the_heads_are_passed_over(tmp_path: Path, weights: str) -> None:
    source = random_source()
    if weights.endswith(".bin"):
        torch.save(reference_names(source), tmp_path / weights)
    else:
        save(tmp_path, weights, reference_names(source))
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin", "training_args.bin", "rng_state.pth"):
        torch.save({"state": {}, "last_epoch": 1}, tmp_path / name)
    check_same(read_heads(tmp_path), source)


def test_a_single_file_counts_before_an_older_index(tmp_path: Path) -> None:
    source = random_source()
    older = {name: tensor + 1 for name, tensor in reference_names(source, "medusa_head.").items()}
    save_shards(tmp_path, {**backbone_names(), **older}, lambda name: int(name.startswith("medusa_head")))
    save(tmp_path, "model.safetensors", {**backbone_names(), **reference_names(source, "medusa_head.")})
    check_same(read_heads(tmp_path), source)


@pytest.mark.parametrize("stored_once", [False, True])
def test_a_layers_that_share_one_block(tmp_path: Path, stored_once: bool) -> None:
    source = random_source(layers=1)
    shared = Source([layers * 3 for layers in source.blocks], source.projections)
    tensors = {name: tensor.clone() for name, tensor in reference_names(shared).items()}
    if stored_once:
        tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[1] in ("0", "3")}
    save(tmp_path, "medusa_lm_head.safetensors", tensors)
    read = read_heads(tmp_path)
    assert read.warnings == (("one block a head is stored for 3 layers: all of them use it",) if stored_once else ())
    check_same(read, shared)


def test_b_shared_projection(tmp_path: Path) -> None:
    source = random_source(own=False, layers=2)
    save(tmp_path, "medusa_lm_head.safetensors", reference_names(source))
    write_config(tmp_path, version="2", medusa_num_heads=3, medusa_num_layers=2)
    read = read_heads(tmp_path)
    assert (read.layout, read.warnings) == ("b", ())
    assert read.heads.config.projection == "shared"
    check_fit(read.heads, hidden_size=HIDDEN, vocab_size=VOCAB)
    check_same(read, source)


@pytest.mark.parametrize("sharded", [False, True])
def test_c_merged_checkpoint(tmp_path: Path, sharded: bool) -> None:
    source = random_source()
    tensors = {**backbone_names(), **reference_names(source, "medusa_head.")}
    if sharded:
        save_shards(tmp_path, tensors, lambda name: 2 if name.endswith("bias") else 1 if name.startswith("medusa_head") else 0)
        # A shard without heads isn't looked at.
        (tmp_path / "model-00000.safetensors").write_bytes(b"damaged")
    else:
        save(tmp_path, "model.safetensors", tensors)
    write_config(tmp_path, hidden_size=HIDDEN, vocab_size=VOCAB, num_hidden_layers=32, medusa_num_heads=3, medusa_num_layers=1)
    read = read_heads(tmp_path)
    assert (read.layout, read.warnings) == ("c", ())
    check_same(read, source)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("draft", "rows"), [(None, None), (10, 10), (10, VOCAB)])
def test_d_vllm(tmp_path: Path, prefix: str, bias: bool, draft: int | None, rows: int | None) -> None:
    source = random_source(bias=bias, draft=draft, rows=rows)
    save(tmp_path, "model.safetensors", vllm_names(source, prefix))
    sizes = {"vocab_size": VOCAB, "truncated_vocab_size": draft or VOCAB}
    write_config(tmp_path, model_type="medusa", num_heads=3, num_hidden_layers=1, medusa_fc_bias=bias, **sizes)
    read = read_heads(tmp_path)
    assert read.layout == "d"
    assert read.warnings == (() if bias else ("3 of 3 blocks have no bias: taken as zero",))
    assert read.heads.config.draft_vocab_size == (draft or VOCAB)
    check_fit(read.heads, hidden_size=HIDDEN, vocab_size=VOCAB)
    check_same(read, source)


@pytest.mark.parametrize("draft", [None, 10])
def test_d_vllm_over_the_backbones_projection(tmp_path: Path, draft: int | None) -> None:
    source = random_source(own=False, draft=draft)
    copy = {"lm_heads.0.weight": OUTPUT}
    save(tmp_path, "model.safetensors", {**vllm_names(source), **copy})
    write_config(tmp_path, num_heads=3, num_hidden_layers=1, vocab_size=VOCAB, original_lm_head=True)
    read = read_heads(tmp_path)
    assert read.heads.config.projection == ("shared" if draft is None else "pruned")
    assert any("original_lm_head" in warning for warning in read.warnings)
    check_fit(read.heads, hidden_size=HIDDEN, vocab_size=VOCAB)
    check_same(read, source)


def test_d_vllm_ignores_a_token_map_over_the_whole_vocabulary(tmp_path: Path) -> None:
    source = random_source()
    save(tmp_path, "model.safetensors", {**vllm_names(source), "token_map": torch.arange(VOCAB).flip(0)})
    write_config(tmp_path, num_heads=3, num_hidden_layers=1, vocab_size=VOCAB, truncated_vocab_size=VOCAB)
    read = read_heads(tmp_path)
    assert read.heads.token_map is None
    assert any("token_map is unused" in warning for warning in read.warnings)
    check_same(read, source)


@pytest.mark.parametrize("per_row", [False, True])
def test_e_model_optimizer_float8(tmp_path: Path, per_row: bool) -> None:
    source = random_source()
    stored, meant = to_float8(reference_names(source, "medusa_heads."), per_row=per_row)
    # The scale of a weight may lie in another shard than the weight.
    save_shards(tmp_path, {**backbone_names(), **stored}, lambda name: len(name) % 3)
    write_config(tmp_path, hidden_size=HIDDEN, vocab_size=VOCAB, medusa={"num_medusa_heads": 3, "num_medusa_layers": 1})
    read = read_heads(tmp_path)
    assert (read.layout, read.warnings) == ("e", ())
    blocks = [[(meant[f"medusa_heads.{h}.0.linear.weight"], source.blocks[h][0][1])] for h in range(3)]
    check_same(read, Source(blocks, [meant[f"medusa_heads.{h}.1.weight"] for h in range(3)]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_f_tensorrt_llm_ranks(tmp_path: Path, ranks: int) -> None:
    source = random_source(rows=48)
    tensors = trtllm_names(source)
    for rank in range(ranks):
        slices = {name: tensor.chunk(ranks)[rank] for name, tensor in tensors.items()}
        save(tmp_path, f"rank{rank}.safetensors", {**slices, "transformer.vocab_embedding.weight": torch.ones(4, HIDDEN)})
    fields = {"num_medusa_heads": 3, "num_medusa_layers": 1, "max_draft_len": 63}
    write_config(tmp_path, hidden_size=HIDDEN, vocab_size=VOCAB, mapping={"tp_size": ranks}, **fields)
    read = read_heads(tmp_path)
    assert read.layout == "f"
    assert read.warnings == ("projections have 48 rows, the heads' config says vocab_size 40: the rest is padding, dropped",)
    check_same(read, Source(source.blocks, [projection[:VOCAB] for projection in source.projections]))


def test_f_tensorrt_llm_float8(tmp_path: Path) -> None:
    source = random_source()
    stored, meant = to_float8(trtllm_names(source))
    renamed = {name.replace("weight_scale", "weights_scaling_factor"): tensor for name, tensor in stored.items()}
    renamed = {name.replace("input_scale", "activation_scaling_factor"): tensor for name, tensor in renamed.items()}
    save(tmp_path, "rank0.safetensors", renamed)
    blocks = [[(meant[f"medusa_heads.{h}.medusa_layers.0.linear.weight"], source.blocks[h][0][1])] for h in range(3)]
    check_same(read_heads(tmp_path), Source(blocks, [meant[f"medusa_heads.{h}.lm_head.weight"] for h in range(3)]))


@pytest.mark.parametrize("named", ["folder", "file"])
def test_g_our_own(tmp_path: Path, named: str) -> None:
    source = random_source(own=False, draft=10)
    tensors = {"token_map": source.token_map.numpy()} if source.token_map is not None else {}
    for head, layers in enumerate(source.blocks):
        for layer, (weight, bias) in enumerate(layers):
            assert bias is not None
            tensors[f"head.{head}.layer.{layer}.weight"], tensors[f"head.{head}.layer.{layer}.bias"] = (
                weight.numpy(),
                bias.numpy(),
            )
    heads = HeadSet(HeadConfig("medusa", 3, 1, HIDDEN, 10, "pruned"), tensors)
    write_heads(heads, tmp_path / "heads", {"tree": [[0], [1], [0, 0]], "trees": {"narrow": [[0]]}})
    read = read_heads(tmp_path / "heads" if named == "folder" else tmp_path / "heads" / "heads.safetensors")
    assert (read.layout, read.warnings, read.tree) == ("g", (), [[0], [1], [0, 0]])
    assert read.trees == {"default": [[0], [1], [0, 0]], "narrow": [[0]]}
    check_same(read, source)


def test_g_a_tree_deeper_than_the_heads_is_refused(tmp_path: Path) -> None:
    source = random_source(heads=1, own=False)
    weight, bias = source.blocks[0][0]
    assert bias is not None
    tensors = {"head.0.layer.0.weight": weight.numpy(), "head.0.layer.0.bias": bias.numpy()}
    write_heads(HeadSet(HeadConfig("medusa", 1, 1, HIDDEN, VOCAB, "shared"), tensors), tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    write_config(tmp_path / "heads", **config, tree=[[0], [0, 0]])
    with pytest.raises(TreeError, match="2 deep, and there are 1 heads"):
        read_heads(tmp_path / "heads")


def test_a_bundle_has_the_heads_trees_and_a_chain() -> None:
    heads = HeadSet(HeadConfig("medusa", 3, 1, HIDDEN, VOCAB, "shared"), {})
    read = ReadHeads(heads, "g", trees={"default": [[0], [1]], "narrow": [[0]]})
    trees = {name: tree.choices() for name, tree in bundle_trees(None, read, 3, 10).items()}
    assert trees == {"default": [[0], [1]], "narrow": [[0]], "chain": [[0], [0, 0], [0, 0, 0]]}
    trees = bundle_trees(chain(2), read, 3, 10)
    assert trees["default"] == chain(2), "the user's tree wins"
    assert bundle_trees(None, ReadHeads(heads, "a"), 3, 10)["default"] == chain(3)
    assert {name: tree.rows for name, tree in bundle_trees(None, None, 1, 10).items()} == {"default": 1}
