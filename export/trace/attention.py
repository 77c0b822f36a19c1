"""Replaces transformers' attention, masks and cache while a backbone is traced.

Each layer becomes one node of our own domain::

    medusa_deploy::TreeAttention(query, key, value, past_key, past_value, mask, write_index, commit)
        -> (output, present_key, present_value)

Its attribute ``window`` is the number of tokens that a row looks back, itself included; 0 if it sees all of them. ``softcap``
bounds scores before the mask is added: ``softcap · tanh(score / softcap)``; 0 if it doesn't.

:mod:`..passes.lower` turns the node into standard operators or into the CPU's fused one, so that all graphs come from one trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.onnx import ops
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from ...runtime.errors import UnsupportedArchitectureError
from .windows import window_of

DOMAIN = "medusa_deploy"
OP = "TreeAttention"
IMPLEMENTATION = "medusa_deploy_tree"

# Keyword arguments of an attention call whose arithmetic the step graph doesn't express.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "head_mask")


class TraceCache(Cache):
    """Passes rows through, makes masks, and keeps the caches that each layer's attention wrote.

    ``past``: key and value of layer 0, then of layer 1 …, each [B, H_kv, S, D_h]. ``present``: the updated ones by layer.
    ``mask_of``: the additive mask [B, 1, N, T] of a window, or of None. ``capacity``: tokens of a slot.
    """

    def __init__(
        self,
        past: list[torch.Tensor],
        write_index: torch.Tensor,
        commit: torch.Tensor,
        mask_of: Callable[[int | None], torch.Tensor],
        capacity: int,
    ) -> None:
        super().__init__(layers=[])
        self.past = past
        self.write_index = write_index
        self.commit = commit
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mask_of = mask_of
        self._capacity = capacity
        self._masks: dict[int | None, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def mask(self, visible: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return the mask of transformers' mask function ``visible``: one for each window, whoever asks.

        Raises:
            UnsupportedArchitectureError: rows see something else than the latest tokens.
        """
        window = window_of(visible, self._capacity)
        if window not in self._masks:
            self._masks[window] = self._mask_of(window)
        return self._masks[window]

    def window(self, mask: torch.Tensor | None) -> int | None:
        """Return the window of a mask that :meth:`mask` made.

        Raises:
            UnsupportedArchitectureError: another one.
        """
        for window, made in self._masks.items():
            if made is mask:
                return window
        raise UnsupportedArchitectureError(
            "a layer changes its attention mask, or has none",
            hint="the step graph expresses attention to all earlier tokens, or to the latest ones",
        )

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        """Emit the node of one layer; query [B, H, N, D_h], key and value [B, H_kv, N, D_h], mask [B, 1, N, T]."""
        window = self.window(mask) or 0
        past_key, past_value = self.past[2 * layer], self.past[2 * layer + 1]
        output, present_key, present_value = ops.symbolic_multi_out(
            f"{DOMAIN}::{OP}",
            (query, key, value, past_key, past_value, mask, self.write_index, self.commit),
            attrs={"scale": float(scale), "window": window, "softcap": float(softcap)},
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=(query.shape, past_key.shape, past_value.shape),
            version=1,
        )
        self.present[layer] = (present_key, present_value)
        return output

    def present_in_order(self) -> list[torch.Tensor]:
        """Return the updated caches: key and value of layer 0, then of layer 1 …"""
        return [tensor for layer in sorted(self.present) for tensor in self.present[layer]]


_active: list[TraceCache] = []


@contextmanager
def tracing(cache: TraceCache) -> Iterator[TraceCache]:
    """Let attention calls write to ``cache``."""
    _active.append(cache)
    try:
        yield cache
    finally:
        _active.pop()


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if refused:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} uses {', '.join(refused)}, which the step graph can't express",
            hint="export a backbone with plain scaled dot-product attention",
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _active[-1].attend(layer, query, key, value, attention_mask, scale, softcap or 0.0)
    return output.transpose(1, 2).contiguous(), None


def _tree_mask(*, mask_function: Callable[..., torch.Tensor], **_sizes: Any) -> torch.Tensor:
    """Stand for transformers' own ways to make a mask of ``mask_function`` (batch, head, row, column)."""
    return _active[-1].mask(mask_function)


def install(backbone: Any) -> None:
    """Let ``backbone`` (a transformers causal LM) call the tracing attention, with the masks of a step."""
    AttentionInterface.register(IMPLEMENTATION, _tree_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _tree_mask)
    backbone.set_attn_implementation(IMPLEMENTATION)
