"""Writes GGUF files of tiny models as llama.cpp's converter stores them, without llama.cpp's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Vocabulary = Callable[[Any], None]
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None}  # fmt: skip
WIDE = {"attention__key_length": 32, "attention__value_length": 32}
"""Metadata of heads that are wider than hidden size ÷ heads."""
GEMMA3 = {
    "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
"""Fields of a config of Gemma 3 whose heads are ``WIDE``."""


def random_model(config: str, **fields: Any) -> Any:
    """A causal LM of a config class with random weights, biases and norms too, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and parameter.ndim == 1 else 0.0, 0.15)
    return model.eval()


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in GGUF's order for llama: the two that rotate together stand next to each other."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)]
    return rows[order]


def tensors_of(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The model's tensors by GGUF's names, in GGUF's order and with GGUF's norms."""
    import gguf

    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        base, kind = name.rsplit(".", 1)
        values = parameter.detach().float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = paired(values, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj." in name:
            values = paired(values, config.num_key_value_heads)
        elif architecture.startswith("gemma") and "norm" in base:
            values = values + 1
        tensors[f"{names.get_name(base)}.{kind}"] = values
    return tensors


def sizes_of(model: Any) -> dict[str, Any]:
    """The metadata that every model has, without the architecture's prefix."""
    config = model.config
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def bytes_vocabulary(writer: Any, pre: str | None, special: Mapping[str, int], merges: tuple[str, ...] = ()) -> None:
    """A byte-level vocabulary: ``special`` tokens with their types, the bytes, and what ``merges`` make."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*special, *sorted(ByteLevel.alphabet()), *("".join(merge.split(" ")) for merge in merges)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([*special.values(), *[1] * (len(tokens) - len(special))])
    writer.add_token_merges(list(merges))


def write_file(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    vocabulary: Vocabulary | None = None,
) -> Path:
    """A GGUF file with ``fields`` behind the architecture's prefix; ``vocabulary`` adds a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        key = f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    if vocabulary is not None:
        vocabulary(writer)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path, model: Any, architecture: str, *, more: Mapping[str, np.ndarray] | None = None, **fields: Any
) -> Path:
    """The file of a model; ``fields`` with ``__`` for the dots, and ``more`` tensors."""
    own = {name.replace("__", "."): value for name, value in fields.items()}
    return write_file(path, architecture, {**sizes_of(model), **own}, {**tensors_of(model, architecture), **(more or {})})
