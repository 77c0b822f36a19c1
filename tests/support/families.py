"""Tiny random models of the families that export must get right, each with everything its family can switch on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
WINDOW = 7  # tokens: odd, shorter than a prefill chunk, and prompts and answers are several windows long


@dataclass(frozen=True)
class Family:
    """``config``: name of a transformers config class; ``fields`` over ``SIZES``; ``dtype`` of the export."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Rope parameters with an original length far below the tests' contexts, so that scaling matters in them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


FAMILIES = {
    "llama: tied, GQA, llama3 rope": Family(
        "LlamaConfig",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        },
    ),
    "llama: untied, MHA, linear rope, biases": Family(
        "LlamaConfig",
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            **rope("linear", factor=4.0),
        },
    ),
    "llama: MQA, yarn rope": Family(
        "LlamaConfig", {"num_key_value_heads": 1, **rope("yarn", factor=4.0, original_max_position_embeddings=16)}
    ),
    "mistral: windows": Family("MistralConfig", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "mistral: GQA, wide heads, window of the capacity": Family(
        "MistralConfig", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64}
    ),
    "qwen2: tied, QKV bias": Family("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2: a window in the second layer": Family(
        "Qwen2Config",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3: norms of queries and keys": Family("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 32}),
    "phi3: fused QKV, partial rotary": Family("Phi3Config", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "phi3: windows": Family("Phi3Config", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "gemma2: windows, soft caps of scores and of logits": Family(
        "Gemma2Config",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3: local and global layers, each with its rotation": Family(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0},
                LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "cohere: a scale of logits, norms of queries and keys": Family(
        "CohereConfig", {"num_key_value_heads": 2, "logit_scale": 0.25, "use_qk_norm": True}
    ),
    "cohere2: windows, no rotation in global layers, a scale of logits": Family(
        "Cohere2Config",
        {"num_key_value_heads": 2, "head_dim": 16, "logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": [LOCAL, GLOBAL]},
    ),
    "granite: multipliers": Family(
        "GraniteConfig",
        {
            "num_key_value_heads": 2,
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.1,
        },
    ),
    "olmo3: windows": Family("Olmo3Config", {"num_key_value_heads": 2, "sliding_window": WINDOW, "layer_types": [LOCAL, GLOBAL]}),
    "exaone4: windows, no rotation in global layers": Family(
        "Exaone4Config", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW, "layer_types": [LOCAL, GLOBAL]}
    ),
    "ministral: windows": Family(
        "MinistralConfig", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW, "layer_types": [LOCAL, GLOBAL]}
    ),
    "phi3: longrope within its limit": Family(
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            **rope("longrope", short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[2.0 + i for i in range(8)]),
        },
    ),
}


def make_config(family: Family) -> Any:
    """The family's transformers config."""
    import transformers

    return getattr(transformers, family.config)(**{**SIZES, **family.fields})


def make_family(family: Family, folder: Path) -> Path:
    """Save a random model whose biases and norms aren't the neutral values of an untrained one."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder
