"""Heads in any number format, and beside configs that say something else than their tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_deploy.export.heads.layouts import read_heads
from support.published_heads import (
    HIDDEN,
    VOCAB,
    backbone_names,
    check_same,
    random_source,
    reference_names,
    save,
    write_config,
)

# -- number formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_floating_point_types_keep_their_values(tmp_path: Path, dtype: str) -> None:
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in reference_names(random_source()).items()}
    save(tmp_path, "medusa_lm_head.safetensors", tensors)
    heads = read_heads(tmp_path).heads
    weight = heads.tensors["head.1.layer.0.weight"]
    assert weight.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_array_equal(weight, tensors["1.0.linear.weight"].float().numpy())


# -- odd configs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ('{"medusa_num_heads": 2}', "says medusa_num_heads 2; their tensors have 3 heads"),
        ('{"medusa_num_heads": "3"}', "says medusa_num_heads '3'"),
        ('{"medusa_num_layers": 4}', "says medusa_num_layers 4; their tensors have 1 layers a head"),
        ('{"medusa": {"num_medusa_heads": 9}}', "says num_medusa_heads 9"),
        ('{"medusa": [], "hidden_size": 4096}', "says hidden_size 4096; their tensors have 16 as the hidden size"),
        ('{"medusa_num_heads": ', "config is ignored"),
        ("[3]", "config is ignored"),
        ("[" * 100_000, "config is ignored"),
    ],
)
def test_a_wrong_config_is_a_warning(tmp_path: Path, config: str, warning: str) -> None:
    source = random_source()
    save(tmp_path, "medusa_lm_head.safetensors", reference_names(source))
    (tmp_path / "config.json").write_text(config)
    read = read_heads(tmp_path)
    assert len(read.warnings) == 1
    assert warning in read.warnings[0]
    check_same(read, source)


def test_a_backbones_config_beside_merged_heads_is_no_contradiction(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", {**backbone_names(), **reference_names(random_source(), "medusa_head.")})
    write_config(tmp_path, model_type="llama", num_hidden_layers=32, num_heads=8, hidden_size=HIDDEN, vocab_size=VOCAB)
    assert read_heads(tmp_path).warnings == ()


def test_missing_biases_are_counted(tmp_path: Path) -> None:
    tensors = reference_names(random_source())
    del tensors["1.0.linear.bias"]
    save(tmp_path, "medusa_lm_head.safetensors", tensors)
    read = read_heads(tmp_path)
    assert read.warnings == ("1 of 3 blocks have no bias: taken as zero",)
    assert not read.heads.tensors["head.1.layer.0.bias"].any()
