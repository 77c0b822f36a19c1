"""Turns the metadata of a GGUF file into the config of transformers' model that computes what llama.cpp does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....runtime.errors import CheckpointError, UnsupportedArchitectureError
from .metadata import OTHER_FORM, GgufFile
from .rotation import rope_parameters
from .tokens import special_token, stop_tokens

# Fields that are read, or that say nothing about the result.
_KNOWN = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned",
}  # fmt: skip
# Fields that may be there with the value that changes nothing. llama.cpp itself doesn't read those of YaRN for these families.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False, "pooling_type": 0,
    "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0, "rope.scaling.yarn_log_multiplier": 0.0,
    "nextn_predict_layers": 0, "attention.sliding_window": 0, "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip
_LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, whose attention is scaled by hidden size / heads
_PATTERN = {"gemma2": 2, "gemma3": 6}


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the architectures of GGUF.

    ``config``: transformers' config class. ``permuted``: rows of queries and keys are stored in pairs that rotate together.
    ``shifted_norms``: norms are stored with one added. ``partial``: heads may rotate in part. ``known``: further fields that
    are read. ``further``: further fields of the config, from the file and the size of a head.
    """

    config: str
    permuted: bool = False
    shifted_norms: bool = False
    partial: bool = False
    known: frozenset[str] = frozenset()
    further: Callable[[GgufFile, int], Mapping[str, Any]] = lambda file, head: {}


def _biases(file: GgufFile, _head: int) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_down.bias" in file.tensors}


def _qwen3(file: GgufFile, _head: int) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma2(file: GgufFile, head: int) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": file.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0) or None,
    }
    return {**_gemma(file, head, file.size("attention.sliding_window", 4096)), **caps}


def _gemma3(file: GgufFile, head: int) -> dict[str, Any]:
    window = int(file.number("attention.sliding_window", 0))
    cap = file.number("final_logit_softcapping", 0.0) or None
    return {**_gemma(file, head, window), "final_logit_softcapping": cap}


def _gemma(file: GgufFile, head: int, window: int) -> dict[str, Any]:
    """Return which layers see a window (none if it is 0), and what divides the attention's logits."""
    layers = file.size("block_count")
    wide = layers == _LARGE_GEMMA[file.architecture]
    slides = [window > 0 and each for each in _sliding_layers(file, layers)]
    return {
        "sliding_window": window or file.size("context_length"),  # transformers' models want a number
        "query_pre_attn_scalar": file.size("embedding_length") // file.size("attention.head_count") if wide else head,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
    }


def _sliding_layers(file: GgufFile, layers: int) -> list[bool]:
    """Read the pattern of windows: a flag for each layer, or that every nth layer is full. 0: no layer is."""
    key = f"{file.architecture}.attention.sliding_window_pattern"
    pattern = file.get(key, _PATTERN[file.architecture])
    if isinstance(pattern, list) and len(pattern) >= layers and all(isinstance(each, bool) for each in pattern):
        return pattern[:layers]
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 0:
        raise CheckpointError(f"{key} is {pattern!r:.60}, not a number or {layers} flags", hint=OTHER_FORM)
    return [not pattern or layer % pattern < pattern - 1 for layer in range(layers)]


_WINDOWS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping"})
FAMILIES = {
    "llama": Family("LlamaConfig", permuted=True, further=_biases),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", further=_qwen3),
    # llama.cpp knows that converters have stored windows of Phi 3 wrongly, and lets all layers see everything.
    "phi3": Family("Phi3Config", partial=True, known=frozenset({"attention.sliding_window"})),
    "gemma": Family("GemmaConfig", shifted_norms=True),
    "gemma2": Family("Gemma2Config", shifted_norms=True, known=_WINDOWS | {"attn_logit_softcapping"}, further=_gemma2),
    "gemma3": Family("Gemma3TextConfig", shifted_norms=True, known=_WINDOWS | {"rope.freq_base_swa"}, further=_gemma3),
}


def family_of(file: GgufFile) -> Family:
    """Return the family of the file's architecture.

    Raises:
        UnsupportedArchitectureError: an architecture that isn't read.
    """
    if file.architecture not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"{file.path.name} has the architecture {file.architecture!r}; GGUF files are read of {', '.join(FAMILIES)}",
            hint=OTHER_FORM,
        )
    return FAMILIES[file.architecture]


def gguf_config(file: GgufFile) -> Any:
    """Make the config of the model in a GGUF file.

    Raises:
        CheckpointError: a field is missing or no number.
        UnsupportedArchitectureError: an architecture, a field or a position encoding that can't be mapped.
    """
    import transformers

    family = family_of(file)
    _check_fields(file, family)
    heads = file.size("attention.head_count")
    hidden = file.size("embedding_length")
    head = file.size("attention.key_length", hidden // heads)
    values = file.size("attention.value_length", hidden // heads)
    if values != head:
        raise UnsupportedArchitectureError(
            f"keys of {file.path.name} have {head} numbers a head, values {values}", hint="the step graph caches both in one size"
        )
    fields = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else None,
        "hidden_size": hidden,
        "intermediate_size": file.size("feed_forward_length"),
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.size("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": file.size("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": special_token(file, "bos"),
        "eos_token_id": list(stop_tokens(file)),
        "pad_token_id": None,
        **rope_parameters(file, head, partial=family.partial),
        **family.further(file, head),
    }
    config = getattr(transformers, family.config)(**fields)
    config.name_or_path = str(file.path)
    return config


def _check_fields(file: GgufFile, family: Family) -> None:
    """Refuse fields that nobody here reads: they may change the result."""
    prefix = f"{file.architecture}."
    for key in file.names():
        name = key.removeprefix(prefix)
        if name == key or name in _KNOWN or name in family.known:
            continue
        value = file.get(key)
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            what = "is a mixture of experts" if name.startswith("expert") else "says something that isn't read"
            raise UnsupportedArchitectureError(f"{file.path.name} {what}: {key} is {value!r:.60}", hint=OTHER_FORM)
