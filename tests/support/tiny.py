"""Makes the tiny model and heads of the fixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet

VOCAB = 128
HIDDEN = 64
HEADS = 3
EOS = 2
PRUNED = 96


def make_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Save a random Llama to ``folder``; weights are wide enough that greedy choices are no near-ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_head_set(*, seed: int = 0, scale: float = 0.05) -> HeadSet:
    """Random heads that stay close to the backbone's own prediction, so that some drafts are right."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for head in range(HEADS):
        tensors[f"head.{head}.layer.0.weight"] = rng.normal(0, scale, (HIDDEN, HIDDEN)).astype(np.float32)
        tensors[f"head.{head}.layer.0.bias"] = rng.normal(0, scale, HIDDEN).astype(np.float32)
    return HeadSet(HeadConfig("medusa", HEADS, 1, HIDDEN, VOCAB, "shared"), tensors)


def make_tiny_heads(folder: Path, *, seed: int = 0) -> Path:
    """Write :func:`tiny_head_set` to ``folder``."""
    from medusa_deploy.runtime.files.heads_file import write_heads

    write_heads(tiny_head_set(seed=seed), folder)
    return folder


def random_heads(kind: str, layers: int, projection: str) -> HeadSet:
    """Heads of any form for ``make_tiny_model``; pruned ones choose among ``PRUNED`` tokens."""
    rng = np.random.default_rng(4)
    tensors: dict[str, np.ndarray] = {}
    for head in range(HEADS):
        for layer in range(layers):
            inputs = HIDDEN * (2 if kind == "grounded" and layer == 0 else 1)
            tensors[f"head.{head}.layer.{layer}.weight"] = rng.normal(0, 0.1, (HIDDEN, inputs)).astype(np.float32)
            tensors[f"head.{head}.layer.{layer}.bias"] = rng.normal(0, 0.1, HIDDEN).astype(np.float32)
        if projection == "own":
            tensors[f"head.{head}.projection.weight"] = rng.normal(0, 0.3, (VOCAB, HIDDEN)).astype(np.float32)
    if projection == "pruned":
        tensors["token_map"] = np.sort(rng.permutation(VOCAB)[:PRUNED]).astype(np.int64)
        tensors["projection.weight"] = rng.normal(0, 0.3, (PRUNED, HIDDEN)).astype(np.float32)
    size = PRUNED if projection == "pruned" else VOCAB
    return HeadSet(HeadConfig(kind, HEADS, layers, HIDDEN, size, projection), tensors)  # type: ignore[arg-type]
