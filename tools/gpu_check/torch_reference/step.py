"""The step graph's arithmetic in plain torch, for machines where no executor can run the bundle. Not part of the runtime.

Inputs, outputs and cache rows mean what ``runtime/executors/step_io.py`` says. Everything stays on the device. Nothing depends on
a value that the host would have to wait for, so that a call can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .attention import Attend, fused_attention
from .weights import Heads, Weights

HIDDEN_BIAS = -65504.0
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(slots=True)
class Inputs:
    """Inputs of one step, as in the step graph. ``commit`` None moves nothing. ``logit_rows`` None gives logits of all rows."""

    tokens: Tensor
    positions: Tensor
    ancestors: Tensor
    forced: Tensor
    write_index: Tensor
    commit: Tensor | None = None
    logit_rows: Tensor | None = None


@dataclass(slots=True)
class Outputs:
    """Outputs of one step. Without heads, candidates and log_probs are None."""

    last_row: Tensor
    next_token: Tensor
    candidates: Tensor | None
    log_probs: Tensor | None
    logits: Tensor
    hidden: Tensor


class TorchStep:
    """A backbone and its caches (key and value of layer 0, then of layer 1 …), which :meth:`run` updates in place.

    ``attend`` is one of :mod:`.attention`. ``wrap`` may compile the parts between attentions.
    """

    def __init__(
        self, weights: Weights, caches: list[Tensor], margin: int, attend: Attend | None = None, wrap: Wrap | None = None
    ) -> None:
        self.weights, self.caches, self.margin = weights, caches, margin
        self.attend = attend or fused_attention
        wrap = wrap or (lambda function: function)
        self.before, self.after, self.accept = wrap(before_attention), wrap(after_attention), wrap(accept)
        self.visibility, self.propose = wrap(visibility), wrap(propose)

    def run(self, inputs: Inputs, visible: int, heads: Heads | None = None) -> Outputs:
        """Move, write and verify. ``visible`` is T, the number of cache rows that attention reads."""
        weights, model, eps = self.weights, self.weights.shapes.model, self.weights.shapes.eps
        rows = self._written_rows(inputs)
        mask = self.visibility(inputs.ancestors, inputs.write_index, visible, self.margin, weights.dtype)
        angles = inputs.positions[:, :, None].float() * weights.frequencies  # [B, N, D_h/2]
        cos, sin = angles.cos()[:, None].to(weights.dtype), angles.sin()[:, None].to(weights.dtype)
        x = functional.embedding(inputs.tokens, weights.embedding)
        for index, layer in enumerate(weights.layers):
            query, key, value = self.before(
                x, layer.input_norm, layer.qkv, cos, sin, model.head_dim, model.attention_heads, model.kv_heads, eps
            )
            caches = self.caches[2 * index : 2 * index + 2]
            for cache, new in zip(caches, (key, value), strict=True):
                write(cache, new, rows, inputs.commit)
            keys, values = (cache[:, :, :visible] for cache in caches)
            attended = self.attend(query, keys, values, mask)
            x = self.after(x, attended, layer.out, layer.post_norm, layer.gate_up, layer.down, eps)
        hidden = functional.rms_norm(x, (model.hidden_size,), weights.norm, eps)
        if inputs.logit_rows is not None:
            hidden = hidden.gather(1, inputs.logit_rows[:, :, None].expand(-1, -1, model.hidden_size))
        logits = functional.linear(hidden, weights.projection)
        last_row, next_token, state = self.accept(inputs.tokens, logits, hidden, inputs.ancestors, inputs.forced)
        candidates, log_probs = (None, None) if heads is None else self.propose(state, heads)
        return Outputs(last_row, next_token, candidates, log_probs, logits, hidden)

    def _written_rows(self, inputs: Inputs) -> Tensor:
        """Cache rows int64 [B, K+N] (or [B, N]) that the moved and the new rows go to."""
        before = 0 if inputs.commit is None else self.margin
        offsets = torch.arange(-before, inputs.tokens.shape[1], device=inputs.tokens.device)
        return inputs.write_index[:, None] + offsets


def empty_caches(weights: Weights, slots: int, rows: int) -> list[Tensor]:
    """Zeroed caches [B, H_kv, S, D_h], two a layer."""
    model = weights.shapes.model
    size = (slots, model.kv_heads, rows, model.head_dim)
    return [torch.zeros(size, dtype=weights.dtype, device=weights.device) for _ in range(2 * model.layers)]


def before_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the input x [B, N, H] into query [B, heads, N, D_h] and key, value [B, H_kv, N, D_h], rotated."""
    slots, rows = x.shape[:2]
    normed = functional.rms_norm(x, (x.shape[-1],), norm, eps)
    merged = functional.linear(normed, qkv).view(slots, rows, -1, head_dim).transpose(1, 2)
    key, value = heads, heads + kv_heads  # where their heads begin
    return rotate(merged[:, :key], cos, sin), rotate(merged[:, key:value], cos, sin), merged[:, value:]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions over halves: x [B, heads, N, D_h], cos and sin [B, 1, N, D_h/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def write(cache: Tensor, new: Tensor, rows: Tensor, commit: Tensor | None) -> None:
    """Put [moved rows | ``new``] at ``rows``. Moved rows are read before anything is written."""

    def spread(index: Tensor) -> Tensor:
        return index[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])

    if commit is not None:
        new = torch.cat([cache.gather(2, spread(commit)), new], dim=2)
    cache.scatter_(2, spread(rows), new)


def after_attention(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float) -> Tensor:
    """Apply output projection, MLP, and both residuals."""
    x = x + functional.linear(attended, out)
    return x + mlp(functional.rms_norm(x, (x.shape[-1],), norm, eps), gate_up, down)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply the gated MLP over merged gate and up."""
    gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


def visibility(ancestors: Tensor, write_index: Tensor, visible: int, margin: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, N, T]: a row sees the committed rows and its ancestors."""
    rows = ancestors.shape[1]
    columns = torch.arange(visible, device=ancestors.device)
    offset = columns - write_index[:, None]  # [B, T]: the column's row in this step
    committed = (columns >= margin) & (offset < 0)
    inside = (offset >= 0) & (offset < rows)
    own = ancestors.gather(2, offset.clamp(0, rows - 1)[:, None].expand(-1, rows, -1)) & inside[:, None]
    mask = torch.zeros(own.shape, dtype=dtype, device=own.device)
    return mask.masked_fill(~(committed[:, None] | own), HIDDEN_BIAS)[:, None]


def accept(tokens: Tensor, logits: Tensor, hidden: Tensor, ancestors: Tensor, forced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the deepest row without a mismatch on its path [B], and the argmax [B] and the hidden state [B, H] there."""
    rows = torch.arange(tokens.shape[1], device=tokens.device)
    greedy = logits.argmax(-1)
    last_logit = greedy.shape[1] - 1  # in prefill only the last row has logits
    proper = ancestors & (rows != rows[:, None])
    parent = torch.where(proper, rows, 0).amax(-1)
    mismatch = (tokens != greedy.gather(1, parent.clamp(max=last_logit))) & (rows >= forced[:, None])
    related = ancestors.float()
    alive = (related @ mismatch.float()[:, :, None]).squeeze(-1) < 0.5
    score = related.sum(-1) * (alive & ancestors.diagonal(dim1=1, dim2=2))
    last_row = score.argmax(-1)
    at = last_row.clamp(max=last_logit)[:, None]
    state = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1])).squeeze(1)
    return last_row, greedy.gather(1, at).squeeze(1), state


def propose(state: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Run the heads at one row: state [B, H] to candidates int64 and log-probabilities float32 [B, K, k]."""
    x = functional.linear(state, heads.blocks, heads.bias).view(len(state), heads.count, -1)
    x = state[:, None] + functional.silu(x)
    if heads.projection.dim() == 3:
        logits = torch.bmm(x.transpose(0, 1), heads.projection.transpose(1, 2)).transpose(0, 1)
    else:
        logits = functional.linear(x, heads.projection)
    log_probs, index = logits.float().log_softmax(-1).topk(heads.top_k, dim=-1)
    return (index if heads.token_map is None else heads.token_map[index]), log_probs
