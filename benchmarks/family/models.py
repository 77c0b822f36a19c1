"""Makes a tiny random model of any causal language model that transformers registers: its config with all sizes forced small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY, HIDDEN, WINDOW, CAPACITY = 128, 64, 16, 256
# Sizes by the names that configs give them. A name that a config lacks, or holds None in, is left out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "n_inner",
         "d_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
         "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads", "linear_num_key_heads",
         "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "dim_head", "kv_channels", "attention_head_size", "linear_key_head_dim", "linear_value_head_dim",
         "qk_nope_head_dim", "v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"), 2 * CAPACITY),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "local_attention"), WINDOW),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "num_mlp_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "num_expert_groups"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "expert_ffn_hidden_size", "moe_ffn_hidden_size"), 32),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    "mlp_ratio": 2,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What one family needs beside: relations between its sizes, or the switch that makes it a decoder.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ministral": {"head_dim": 16},
    "moshi": {"audio_vocab_size": 128},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": None},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "zamba": {"layer_types": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Families made of their text model's config and what the other parts need to fit it: their defaults contradict each other.
_TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dots3_note": ("dots3_note_text", {key: {"adapter_out_dim": HIDDEN} for key in ("vision_config", "audio_config")}),
    "gemma4_assistant": ("gemma4_text", {}),
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def families() -> dict[str, str]:
    """Return every model type that transformers registers as a causal language model, with its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {str(family): str(architecture) for family, architecture in NAMES.items()}


def make_config(family: str) -> Any:
    """Make the config of a family: its defaults with small sizes, one layer of each kind, and a decoder's mask."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    if family in _TEXTS:
        text, others = _TEXTS[family]
        return config_class(text_config={**_fields(CONFIG_MAPPING[text]), **FAMILIES[family]}, **others)
    return config_class(**{**_fields(config_class), **FAMILIES.get(family, {})})


def _fields(config_class: Any) -> dict[str, Any]:
    defaults = config_class()
    known = defaults.to_dict()
    fields = {name: value for name, value in SMALL.items() if _number(known.get(name))}
    fields.update({name: value for name, value in _IDS.items() if name in known})
    kinds = known.get("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds and not isinstance(getattr(config_class, "layer_types", None), property):
        each = list(dict.fromkeys(kinds))
        fields["layer_types"] = (each * 2)[: max(2, len(each))]
        fields.update({name: len(fields["layer_types"]) for name in _LAYERS if name in fields})
    if "is_decoder" in known:
        fields["is_decoder"] = True
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if hasattr(sub, "model_type") and isinstance(getattr(defaults, name, None), sub):
            fields[name] = {**_fields(sub), **FAMILIES.get(sub.model_type, {})}
    return fields


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def save_weights(config: Any, folder: Path) -> None:
    """Save a random model whose biases and norms aren't the neutral values of an untrained one."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name or "ln" in name else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
