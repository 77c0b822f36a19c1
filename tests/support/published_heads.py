"""Writes random heads in every published layout, and runs them as their makers do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from medusa_deploy.export.heads.layouts import ReadHeads
from medusa_deploy.export.heads.module import HeadStack

HIDDEN = 16
VOCAB = 40


@dataclass(frozen=True)
class Source:
    """Heads as trained: ``blocks[h][l]`` is (weight, bias or None), ``projections[h]`` [V', H] or none at all."""

    blocks: list[list[tuple[Tensor, Tensor | None]]]
    projections: list[Tensor]
    token_map: Tensor | None = None

    def candidates(self, state: Tensor, output: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities [K, k] of one hidden state [H]; ``output`` is the backbone's projection [V, H]."""
        found = []
        for head, layers in enumerate(self.blocks):
            x = state
            for weight, bias in layers:
                x = x + functional.silu(weight @ x + (0 if bias is None else bias))
            projection = self.projections[head] if self.projections else output
            if self.token_map is not None and len(projection) > len(self.token_map):
                projection = projection[self.token_map]
            values, indices = functional.log_softmax(projection @ x, -1).topk(top_k)
            found.append((indices if self.token_map is None else self.token_map[indices], values))
        return torch.stack([ids for ids, _ in found]), torch.stack([values for _, values in found])


def random_source(
    *, heads: int = 3, layers: int = 1, bias: bool = True, own: bool = True, draft: int | None = None, rows: int | None = None
) -> Source:
    """``draft``: size of the draft vocabulary; ``rows`` of each projection (default: the draft vocabulary's, or ``VOCAB``)."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    blocks = [[(normal(HIDDEN, HIDDEN), normal(HIDDEN) if bias else None) for _ in range(layers)] for _ in range(heads)]
    projections = [normal(rows or draft or VOCAB, HIDDEN) for _ in range(heads)] if own else []
    token_map = None if draft is None else torch.randperm(VOCAB, generator=generator)[:draft]
    return Source(blocks, projections, token_map)


def reference_names(source: Source, prefix: str = "") -> dict[str, Tensor]:
    """``{h}.{l}.linear.weight`` …: the reference implementation's."""
    tensors = {}
    for head, layers in enumerate(source.blocks):
        for layer, (weight, bias) in enumerate(layers):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = weight
            if bias is not None:
                tensors[f"{prefix}{head}.{layer}.linear.bias"] = bias
        if source.projections:
            tensors[f"{prefix}{head}.{len(layers)}.weight"] = source.projections[head]
    return tensors


def vllm_names(source: Source, prefix: str = "") -> dict[str, Tensor]:
    """``blocks.{h}.layers.{l}.weight`` …: vLLM's."""
    tensors = {}
    for head, layers in enumerate(source.blocks):
        for layer, (weight, bias) in enumerate(layers):
            tensors[f"{prefix}blocks.{head}.layers.{layer}.weight"] = weight
            if bias is not None:
                tensors[f"{prefix}blocks.{head}.layers.{layer}.bias"] = bias
        if source.projections:
            tensors[f"{prefix}lm_heads.{head}.weight"] = source.projections[head]
    if source.token_map is not None:
        tensors[f"{prefix}token_map"] = source.token_map
    return tensors


def trtllm_names(source: Source) -> dict[str, Tensor]:
    """``medusa_heads.{h}.medusa_layers.{l}.linear.weight`` …: TensorRT-LLM's."""
    tensors = {}
    for head, layers in enumerate(source.blocks):
        for layer, (weight, bias) in enumerate(layers):
            tensors[f"medusa_heads.{head}.medusa_layers.{layer}.linear.weight"] = weight
            if bias is not None:
                tensors[f"medusa_heads.{head}.medusa_layers.{layer}.linear.bias"] = bias
        tensors[f"medusa_heads.{head}.lm_head.weight"] = source.projections[head]
    return tensors


def backbone_names() -> dict[str, Tensor]:
    """Some of a backbone's tensors, which stand beside the heads in merged checkpoints."""
    return {
        "model.embed_tokens.weight": torch.ones(VOCAB, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(HIDDEN, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": torch.ones(HIDDEN, HIDDEN),
        "lm_head.weight": torch.ones(VOCAB, HIDDEN),
    }


def to_float8(tensors: dict[str, Tensor], *, per_row: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights as float8 with scales (Model Optimizer's names), and what they stand for."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            stored[name] = meant[name] = tensor
            continue
        largest = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
        scale = largest / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
        stored[name.replace(".weight", ".input_scale")] = torch.tensor(0.1)
        meant[name] = stored[name].float() * scale
    return stored, meant


def write_config(folder: Path, **fields: Any) -> None:
    """``config.json`` of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))


def save(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """A safetensors file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def save_shards(folder: Path, tensors: dict[str, Tensor], place: Callable[[str], int]) -> None:
    """A sharded checkpoint with its index; ``place(name)`` is the shard of a tensor."""
    names = {name: f"model-{place(name):05}.safetensors" for name in tensors}
    for file in set(names.values()):
        save(folder, file, {name: tensor for name, tensor in tensors.items() if names[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


OUTPUT = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.3


def check_same(read: ReadHeads, source: Source, *, exact: bool = True) -> None:
    """The record holds the source's numbers, and proposes what the source's maker would."""
    heads = read.heads
    assert (heads.config.num_heads, heads.config.num_layers) == (len(source.blocks), len(source.blocks[0]))
    assert heads.config.hidden_size == HIDDEN
    tolerance = 0 if exact else 1e-6
    for head, layers in enumerate(source.blocks):
        for layer, (weight, bias) in enumerate(layers):
            read_weight, read_bias = heads.layer(head, layer)
            np.testing.assert_allclose(read_weight, weight.float().numpy(), atol=tolerance)
            np.testing.assert_allclose(read_bias, np.zeros(HIDDEN) if bias is None else bias.float().numpy(), atol=tolerance)
    output = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    output.weight = torch.nn.Parameter(OUTPUT, requires_grad=False)
    stack = HeadStack(heads, output, 5, torch.float32)
    for seed in range(4):
        state = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
        candidates, log_probs = stack(state[None, None], torch.zeros(1, 1, HIDDEN))
        expected, expected_log_probs = source.candidates(state, OUTPUT, 5)
        torch.testing.assert_close(candidates[0], expected)
        torch.testing.assert_close(log_probs[0], expected_log_probs, atol=1e-5, rtol=1e-5)
