"""Weights of the torch reference: random ones of any size, or those of a transformers model.

Query, key and value are merged into one matrix, and so are gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ....runtime.errors import UsageError
from ....runtime.files.heads import HeadSet
from ..shapes import Shapes

PROJECTIONS = ("shared", "own", "pruned")


@dataclass(slots=True)
class Layer:
    """One decoder layer: ``qkv`` [(heads + 2·kv_heads)·D_h, H], ``out`` [H, heads·D_h], ``gate_up`` [2·I, H], ``down`` [H, I]."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(slots=True)
class Weights:
    """A backbone. ``embedding`` and ``projection`` [V, H] may be the same tensor; ``frequencies`` float32 [D_h / 2]."""

    shapes: Shapes
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    projection: Tensor
    frequencies: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of all matrices."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.embedding.device


@dataclass(slots=True)
class Heads:
    """K heads of one block ``x + SiLU(W x + b)``: ``blocks`` [K·H, H], ``bias`` [K·H].

    ``projection``: [K, V, H] own, [V', H] pruned (``token_map`` int64 [V']: draft index to token id), or the backbone's.
    """

    kind: str
    count: int
    top_k: int
    blocks: Tensor
    bias: Tensor
    projection: Tensor
    token_map: Tensor | None = None


def random_weights(shapes: Shapes, device: str, dtype: torch.dtype, seed: int = 0, std: float | None = None) -> Weights:
    """Make a random backbone on the device.

    ``std`` is that of the matrices; None takes 1/√H, which keeps fp16 activations small.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model, hidden = shapes.model, shapes.model.hidden_size
    scale = hidden**-0.5 if std is None else std

    def matrix(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, scale, generator=generator)

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=dtype, device=device)

    layers = [
        Layer(
            ones(),
            matrix(shapes.qkv_rows, hidden),
            matrix(hidden, model.query_size),
            ones(),
            matrix(2 * model.intermediate_size, hidden),
            matrix(hidden, model.intermediate_size),
        )
        for _ in range(model.layers)
    ]
    embedding, projection = (matrix(model.vocab_size, hidden) for _ in range(2))
    return Weights(shapes, embedding, layers, ones(), projection, _frequencies(shapes, device))


def random_heads(weights: Weights, kind: str, *, count: int = 4, top_k: int = 10, seed: int = 1) -> Heads:
    """Make random heads close to the backbone's own prediction, so that on tiny models some drafts are right.

    Raises:
        UsageError: ``kind`` is none of ``PROJECTIONS``.
    """
    if kind not in PROJECTIONS:
        raise UsageError(f"heads with {kind!r} projections", hint=f"one of {', '.join(PROJECTIONS)}")
    shapes, dtype, device = weights.shapes, weights.dtype, weights.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, std, generator=generator)

    hidden = shapes.model.hidden_size
    blocks, bias = normal(count * hidden, hidden, std=0.4 / hidden), normal(count * hidden, std=0.05)
    token_map, projection = None, weights.projection
    if kind == "own":
        projection = weights.projection[None].repeat(count, 1, 1)
    if kind == "pruned":
        token_map = torch.randperm(shapes.model.vocab_size, generator=generator, device=device)[: shapes.draft_vocab]
        projection = weights.projection[token_map].contiguous()
    return Heads(kind, count, min(top_k, shapes.draft_vocab), blocks, bias, projection, token_map)


def weights_of(state: Mapping[str, Tensor], shapes: Shapes) -> Weights:
    """Read a backbone from a transformers Llama state dict. Without ``lm_head.weight`` the embedding is tied."""

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = (f"{prefix}{part}." for part in ("self_attn", "mlp"))
        return Layer(
            state[f"{prefix}input_layernorm.weight"],
            torch.cat([state[f"{attention}{name}_proj.weight"] for name in "qkv"]),
            state[f"{attention}o_proj.weight"],
            state[f"{prefix}post_attention_layernorm.weight"],
            torch.cat([state[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]),
            state[f"{mlp}down_proj.weight"],
        )

    embedding = state["model.embed_tokens.weight"]
    layers = [layer(index) for index in range(shapes.model.layers)]
    projection = state.get("lm_head.weight", embedding)
    return Weights(shapes, embedding, layers, state["model.norm.weight"], projection, _frequencies(shapes, str(embedding.device)))


def heads_of(heads: HeadSet, weights: Weights, top_k: int) -> Heads:
    """Read heads of one ``medusa`` block that use the backbone's projection.

    Raises:
        UsageError: heads of another form.
    """
    config = heads.config
    if (config.kind, config.num_layers, config.projection) != ("medusa", 1, "shared"):
        raise UsageError(f"{config.kind} heads, {config.projection} projection", hint="medusa heads of one block, shared")
    pairs = [heads.layer(head, 0) for head in range(config.num_heads)]
    blocks, bias = (torch.cat([torch.from_numpy(pair[part]) for pair in pairs]).to(weights.dtype) for part in (0, 1))
    return Heads("shared", config.num_heads, top_k, blocks, bias, weights.projection)


def moved(record: Any, device: str) -> Any:
    """Copy weights or heads to another device."""
    if isinstance(record, Tensor):
        return record.to(device)
    if isinstance(record, list):
        return [moved(entry, device) for entry in record]
    if isinstance(record, (Weights, Layer, Heads)):
        return replace(record, **{entry.name: moved(getattr(record, entry.name), device) for entry in fields(record)})
    return record


def _frequencies(shapes: Shapes, device: str) -> Tensor:
    head_dim = shapes.model.head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / shapes.rope_theta**exponents
