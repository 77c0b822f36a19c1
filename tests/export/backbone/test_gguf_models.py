"""GGUF files: each family computes what the model that was written to the file computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_deploy.export.backbone.backbone import check_architecture, load_config, load_module
from medusa_deploy.runtime.errors import UnsupportedArchitectureError
from support.gguf_files import GEMMA3, SIZES, WIDE, random_model, sizes_of, tensors_of, write_model

pytest.importorskip("gguf")
TOKENS = torch.tensor([np.random.default_rng(0).integers(0, 128, 48).tolist()])
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
ROPE = {"rope_type": "default", "rope_theta": 5e5}


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = module(TOKENS, use_cache=False).logits[0]
    return result


def check_same(path: Path, model: Any) -> None:
    torch.testing.assert_close(logits(load_module(path, "fp32")), logits(model), atol=2e-5, rtol=1e-5)


def llama3_factors(model: Any) -> np.ndarray:
    """What llama.cpp divides the frequencies of this model by."""
    plain = model.config.rope_parameters["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
    factors: np.ndarray = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    return factors


# -- families --------------------------------------------------------------------------------------------------------

# name: architecture, config class, fields of the config, fields of the file
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama 2": ("llama", "LlamaConfig", {}, {"rope__dimension_count": 16}),
    "llama 3": ("llama", "LlamaConfig", {"rope_parameters": ROPE}, {"rope__freq_base": 5e5}),
    "smollm2: tied": ("llama", "LlamaConfig", {"tie_word_embeddings": True}, {}),
    "mistral nemo: wide heads": ("llama", "LlamaConfig", {"head_dim": 32}, WIDE),
    "llama with biases": ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}, {}),
    "linear scaling": (
        "llama",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "linear scaling of old files": (
        "llama",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope__scale_linear": 4.0},
    ),
    "no scaling, said so": ("llama", "LlamaConfig", {}, {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}),
    "qwen2": ("qwen2", "Qwen2Config", {}, {}),
    "qwen2.5 with yarn": (
        "qwen2",
        "Qwen2Config",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 16},
    ),
    "qwen3 with key_length": ("qwen3", "Qwen3Config", {"head_dim": 32}, WIDE),
    "qwen3 without key_length": ("qwen3", "Qwen3Config", {"head_dim": 16}, {}),
    "phi 3: part of a head rotates": ("phi3", "Phi3Config", {"partial_rotary_factor": 0.5}, {"rope__dimension_count": 8}),
    "gemma": ("gemma", "GemmaConfig", {"head_dim": 32}, WIDE),
    "gemma 2": (
        "gemma2",
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, **CAPS},
        {**WIDE, "attention__sliding_window": 16, **CAPS},
    ),
    "gemma 2 with a pattern": (
        "gemma2",
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 3, **CAPS,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        {**WIDE, "attention__sliding_window": 16, "attention__sliding_window_pattern": 3, **CAPS},
    ),
    "gemma 3": (
        "gemma3", "Gemma3TextConfig", GEMMA3,
        {**WIDE, "attention__sliding_window": 16, "rope__freq_base": 1e6,
         "rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
    ),
    "gemma 3 with a flag for each layer": (
        "gemma3", "Gemma3TextConfig", {**GEMMA3, "layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]},
        {**WIDE, "attention__sliding_window": 16, "rope__freq_base": 1e6, "rope__scaling__factor": 8.0,
         "attention__sliding_window_pattern": [False, True] * 3 + [False]},
    ),
    "gemma 3, all layers slide": (
        "gemma3", "Gemma3TextConfig", {**GEMMA3, "layer_types": ["sliding_attention"] * 7},
        {**WIDE, "attention__sliding_window": 16, "attention__sliding_window_pattern": 0},
    ),
    "gemma 3 without a window": (
        "gemma3", "Gemma3TextConfig", {**GEMMA3, "layer_types": ["full_attention"] * 7},
        {**WIDE, "rope__freq_base": 1e6, "rope__scaling__factor": 8.0},
    ),
    "phi 3, whose windows llama.cpp doesn't trust": ("phi3", "Phi3Config", {}, {"attention__sliding_window": 16}),
    "yarn that shrinks": (
        "qwen2",
        "Qwen2Config",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5, "original_max_position_embeddings": 64,
                             "attention_factor": 1.5}},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 0.5, "rope__scaling__original_context_length": 64,
         "rope__scaling__attn_factor": 1.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_was_written(name: str, tmp_path: Path) -> None:
    architecture, config, fields, stored = CASES[name]
    model = random_model(config, **fields)
    check_same(write_model(tmp_path / "model.gguf", model, architecture, **stored), model)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_frequencies_are_divided_by_the_file_s_tensor(factor: float, tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = random_model("LlamaConfig", rope_parameters={**scaled, "rope_theta": 1e4, "original_max_position_embeddings": 64})
    factors = llama3_factors(model)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    path = write_model(
        tmp_path / "a.gguf", model, "llama", more={"rope_freqs.weight": factors / factor}, rope__scaling__factor=factor
    )
    check_same(path, model)
    load_config(path, 10_000)  # longer than its context_length: the divisors hold at any length


def test_long_and_short_factors_of_phi_3(tmp_path: Path) -> None:
    short, long = np.linspace(1, 1.7, 8, dtype=np.float32), np.linspace(2, 9, 8, dtype=np.float32)
    attention = math.sqrt(1 + math.log(256 / 64) / math.log(64))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short.tolist(), "long_factor": long.tolist()}
    model = random_model("Phi3Config", original_max_position_embeddings=64, rope_parameters=rope)
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    fields = {"rope__scaling__original_context_length": 64, "rope__scaling__attn_factor": attention}
    path = write_model(tmp_path / "a.gguf", model, "phi3", more=tensors, **fields)
    check_same(path, model)
    with pytest.raises(UnsupportedArchitectureError, match="beyond 64 tokens"):
        load_config(path, 65)


@pytest.mark.parametrize(("kind", "factor"), [("longrope", 2.0), ("none", 1.0), ("linear", 2.0)])
def test_a_factor_of_phi_3_scales_long_and_short_factors_too(kind: str, factor: float, tmp_path: Path) -> None:
    stored = np.linspace(1, 1.7, 8, dtype=np.float32)
    scaled = (stored * factor).tolist()
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": scaled, "long_factor": scaled, "attention_factor": 1.0}
    model = random_model("Phi3Config", original_max_position_embeddings=64, rope_parameters=rope)
    tensors = {"rope_factors_short.weight": stored, "rope_factors_long.weight": stored}
    fields = {"rope__scaling__original_context_length": 64, "rope__scaling__type": kind, "rope__scaling__factor": 2.0}
    check_same(write_model(tmp_path / "a.gguf", model, "phi3", more=tensors, **fields), model)


def test_equal_long_and_short_factors_hold_at_any_length() -> None:
    rope = {"rope_type": "longrope", "short_factor": [2.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = random_model("LlamaConfig", rope_parameters={**rope, "original_max_position_embeddings": 64}).config
    check_architecture(config, 10_000)
    config.rope_parameters["long_factor"] = [2.0] * 7 + [3.0]
    with pytest.raises(UnsupportedArchitectureError, match="beyond 64 tokens"):
        check_architecture(config, 65)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_weights_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    import gguf

    model = random_model("Qwen2Config", hidden_size=64)
    packed = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    for name, value in sizes_of(model).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen2.{name}", value)
    expected = {}
    for name, values in tensors_of(model, "qwen2").items():
        if values.ndim == 1:
            writer.add_tensor(name, values.copy())
            continue
        data = gguf.quants.quantize(values, packed)
        writer.add_tensor(name, data, raw_dtype=packed)
        expected[name] = gguf.quants.dequantize(data, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = load_module(tmp_path / "model.gguf", "fp32").state_dict()
    for layer in range(2):
        for theirs, ours in {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}.items():
            values = state[f"model.layers.{layer}.{ours}.weight"].numpy()
            np.testing.assert_array_equal(values, expected[f"blk.{layer}.{theirs}.weight"])


def test_one_size_for_every_layer_may_be_said_layer_by_layer(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    check_same(write_model(tmp_path / "a.gguf", model, "llama", attention__head_count_kv=[2, 2]), model)


def test_what_lies_beside_the_file_changes_nothing(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    write_model(tmp_path / "MODEL.GGUF", model, "llama")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{")
    check_same(tmp_path, model)
    assert load_config(tmp_path, 64).hidden_size == SIZES["hidden_size"]
