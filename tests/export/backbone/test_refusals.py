"""What the step graph can't express is refused by name from the config: no test here writes weights that could be loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_deploy.export.backbone.backbone import backbone_shape, load_config
from medusa_deploy.export.backbone.refusal.refusals import skeleton
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import CheckpointError, UnsupportedArchitectureError
from support.families import Family, make_config

OLDER: dict[str, Any] = {"vocab_size": 128, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
SINKS = {"num_key_value_heads": 2, "layer_types": ["full_attention", "sliding_attention"]}
REFUSED = {
    "experts": (Family("MixtralConfig", EXPERTS), "mixtral is a mixture of experts: model.layers.0.mlp.experts is Mixtral"),
    "experts with sinks": (Family("GptOssConfig", {**EXPERTS, "head_dim": 16}), "gpt_oss is a mixture of experts"),
    "sinks": (Family("GraniteSWAConfig", SINKS), "granite_swa has attention sinks: model.layers.0.self_attn.sinks"),
    "alibi": (Family("BloomConfig", OLDER), r"bloom adds positions to the attention's logits \(ALiBi\)"),
    "alibi by a switch": (Family("FalconConfig", {"alibi": True}), r"falcon adds positions .*\(ALiBi\): alibi is true"),
    "latent attention": (
        Family("MiniCPM3Config", LATENT),
        r"minicpm3 has latent attention \(MLA\): model.layers.0.self_attn.kv_a_proj_with_mqa is Linear",
    ),
    "a recurrent network": (Family("RwkvConfig"), "rwkv has recurrent layers, which keep a state: rwkv is RwkvModel"),
    "some recurrent layers": (
        Family("Qwen3NextConfig", {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]}),
        "qwen3_next has recurrent layers, which keep a state: model.layers.0.linear_attn is Qwen3NextGatedDeltaNet",
    ),
    "convolutions": (
        Family("Lfm2Config", {"layer_types": ["full_attention", "conv"]}),
        "lfm2 has convolutional layers: model.layers.1.conv is Lfm2ShortConv",
    ),
    "an encoder and a decoder": (Family("BartConfig", {"d_model": 64}), "bart has an encoder beside its decoder"),
    "an encoder": (Family("BertConfig"), "bert is an encoder: is_decoder is false"),
    "a decoder of an encoder": (
        Family("TrOCRConfig", {"d_model": 64, "is_decoder": True}),
        "trocr attends to an encoder: .*encoder_attn",
    ),
    "images": (Family("Gemma3Config"), "gemma3 reads images beside text"),
    "a model in a model": (Family("FuyuConfig"), "fuyu is a language model inside of another model"),
    "no language model": (Family("ViTConfig"), "vit is no causal language model"),
    "its own attention": (
        Family("GPTJConfig", {**OLDER, "rotary_dim": 8}),
        r"gptj .* offers no replacement for: transformer.h.0.attn \(GPTJAttention\)",
    ),
    "its own mask": (Family("DogeConfig"), r"doge .* makes a mask of its own: shape .* \(DogeAttention\)"),
    "two attentions a layer": (Family("DiffLlamaConfig"), "diffllama .* asks for attention 4 times in 2 layers"),
    "a head of its own": (
        Family("RobertaConfig", {"is_decoder": True}),
        "roberta .* changes what its decoder returns before the projection reads it",
    ),
    "a setting that transformers doesn't know": (
        Family("LlamaConfig", {"hidden_act": "nothing"}),
        "transformers can't make a causal language model of this llama config: KeyError: .*nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("weights", ["copied", "linked"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_name_before_a_weight_is_read(name: str, weights: str, tmp_path: Path) -> None:
    family, message = REFUSED[name]
    make_config(family).save_pretrained(tmp_path / "model")
    with pytest.raises((UnsupportedArchitectureError, CheckpointError), match=message) as caught:
        export_bundle(tmp_path / "model", None, tmp_path / "bundle", capacity=64, weights=weights)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fields_that_no_module_reads_change_nothing(tmp_path: Path) -> None:
    stray = {**EXPERTS, **LATENT, "alibi": False, "attention_sink_size": 4, "conv_kernel": 4, "ssm_state_size": 16}
    make_config(Family("LlamaConfig", stray)).save_pretrained(tmp_path)
    load_config(tmp_path, 64)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        (Family("GPTBigCodeConfig", {**OLDER, "multi_query": True}), (4, 1, 16)),
        (Family("GPTNeoXConfig", {"num_key_value_heads": 2, "head_dim": 8}), (4, 4, 16)),
        (Family("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 32}), (4, 2, 32)),
    ],
)
def test_sizes_come_from_the_modules(family: Family, sizes: tuple[int, int, int]) -> None:
    shape = backbone_shape(skeleton(make_config(family)))
    assert (shape.attention_heads, shape.kv_heads, shape.head_dim) == sizes


QUANTISED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes without a name": ({"load_in_8bit": True}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4}, "AWQ"),
    "fp8": ({"quant_method": "fp8"}, "FP8"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "a format of next year": ({"quant_method": "q1"}, "q1"),
}


@pytest.mark.parametrize("weights", ["copied", "linked"])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_its_format(name: str, weights: str, tmp_path: Path) -> None:
    settings, shown = QUANTISED[name]
    make_config(Family("LlamaConfig", {"quantization_config": settings})).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"llama's weights are quantised: config.json names the format {shown}") as caught:
        export_bundle(tmp_path / "model", None, tmp_path / "bundle", capacity=64, weights=weights)
    assert "dequantize" in caught.value.hint


PACKED = {
    "q_proj.qweight": (torch.int32, "GPTQ or AWQ"),
    "q_proj.weight.absmax": (torch.float32, "bitsandbytes"),
    "q_proj.weight_packed": (torch.int32, "compressed-tensors"),
    "q_proj.weight": (torch.float8_e4m3fn, "FP8"),
    "k_proj.weight": (torch.int8, "I8 integers"),
}


@pytest.mark.parametrize("weights", ["copied", "linked"])
@pytest.mark.parametrize("name", PACKED)
def test_quantised_tensors_are_refused_where_the_config_keeps_silent(name: str, weights: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dtype, shown = PACKED[name]
    model = tmp_path / "model"
    make_config(Family("LlamaConfig")).save_pretrained(model)
    save_file({f"model.layers.0.self_attn.{name}": torch.ones(64, 64).to(dtype)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"quantised: model.layers.0.self_attn.{name} .* of the format {shown}"):
        export_bundle(model, None, tmp_path / "bundle", capacity=64, weights=weights)


def test_a_large_model_is_looked_at_in_seconds(tmp_path: Path) -> None:
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    make_config(Family("LlamaConfig", {**large, "num_key_value_heads": 8})).save_pretrained(tmp_path)
    load_config(tmp_path, 64)  # imports
    started = time.process_time()
    load_config(tmp_path, 64)
    assert time.process_time() - started < 5
