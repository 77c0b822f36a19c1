"""Write a Hugging Face folder of fp32 Llama weights as an F32 GGUF file, for llama.cpp.

Usage: ``python -m peer.to_gguf MODEL OUT.gguf``, with ``benchmarks`` in PYTHONPATH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model: Path, output: Path) -> None:
    """Write ``model`` (config.json, tokenizer.json, model.safetensors in fp32) as one F32 GGUF file, unchanged in value.

    Raises:
        ValueError: not a plain Llama, not fp32, or not a byte-level BPE tokenizer.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default" or config.get("attention_bias"):
        raise ValueError(f"{model}: only Llama without rope scaling or biases is written here, not {config['model_type']}")
    weights = load_file(model / "model.safetensors")
    if other := {str(array.dtype) for array in weights.values()} - {"float32"}:
        raise ValueError(f"{model}: the comparison is in fp32, the weights are {', '.join(sorted(other))}")

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(output, "llama")
    writer.add_name(model.name)
    writer.add_file_type(0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, model, config)

    def add(name: str, array: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array), raw_dtype=GGMLQuantizationType.F32)

    add("token_embd", weights["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        for short, long in _LAYER_TENSORS.items():
            array = weights[f"model.layers.{layer}.{long}.weight"]
            if short in ("attn_q", "attn_k"):
                array = _interleave(array, heads if short == "attn_q" else kv_heads)
            add(f"blk.{layer}.{short}", array)
    add("output_norm", weights["model.norm.weight"])
    if not config.get("tie_word_embeddings"):
        add("output", weights["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows from the half-split rotary order of Hugging Face to the interleaved one of GGUF's Llama. [heads · D, H] both ways."""
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: Any, model: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    bpe = tokenizer["model"]
    if bpe["type"] != "BPE" or bpe.get("byte_fallback"):
        raise ValueError(f"{model}: only byte-level BPE tokenizers are written here")
    tokens = [f"[unused {index}]" for index in range(config["vocab_size"])]
    kinds = [5] * len(tokens)  # unused; 1 is normal, 3 control, 4 user-defined
    for token, index in bpe["vocab"].items():
        tokens[index], kinds[index] = token, 1
    for entry in tokenizer["added_tokens"]:
        tokens[entry["id"]], kinds[entry["id"]] = entry["content"], 3 if entry["special"] else 4
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    eos = config["eos_token_id"]
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
