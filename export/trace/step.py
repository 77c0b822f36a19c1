"""Computes a step as a torch module: the backbone, greedy acceptance, and the heads at the accepted row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.executors.step_io import HIDDEN_BIAS
from ..backbone.refusal.positions import position_rows
from ..heads.module import HeadStack
from .attention import TraceCache, install, tracing


def visibility_mask(
    ancestors: Tensor,
    write_index: Tensor,
    columns: Tensor,
    margin: int,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Make the additive mask [B, 1, N, T]: 0 where a row may look, ``HIDDEN_BIAS`` elsewhere.

    A row sees the committed rows, and its ancestors among this step's rows (it is an ancestor of itself)::

        cache row   0 … margin-1   margin … write_index-1   write_index … write_index+N-1   …
        visible     no             yes                      if an ancestor                  no
        position    -              0 … committed-1          its own                         -

    With a ``window``, only those at a position > its own − window.
    """
    rows = ancestors.shape[1]
    committed = (columns[None, :] >= margin) & (columns[None, :] < write_index[:, None])  # [B, T]
    offset = columns[None, :] - write_index[:, None]  # [B, T]
    inside = (offset >= 0) & (offset < rows)
    index = offset.clamp(min=0).minimum(torch.full_like(offset, rows - 1))
    tree = torch.gather(ancestors, 2, index[:, None, :].expand(-1, rows, -1)) & inside[:, None, :]  # [B, N, T]
    visible = committed[:, None, :] | tree
    if window is not None:
        assert positions is not None, "a window counts positions"
        stands = torch.where(inside, torch.gather(positions, 1, index), columns[None, :] - margin)  # [B, T]
        visible = visible & (stands[:, None, :] > positions[:, :, None] - window)
    zero, hidden = torch.zeros((), dtype=dtype), torch.full((), HIDDEN_BIAS, dtype=dtype)
    return torch.where(visible, zero, hidden)[:, None]


def accept(tokens: Tensor, greedy: Tensor, ancestors: Tensor, forced: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the deepest accepted row, int64 [B].

    A row matches when it is forced or carries its parent's argmax. It is accepted when no row of its path mismatches::

        blocked[n] = Σ_a ancestors[n, a] · mismatch[a]     a product [N, N] · [N]; accepted where it is 0

    Rows are in breadth order, so a row's parent is the last of its proper ancestors. A padding row isn't its own ancestor and is
    never accepted. ``greedy`` is [B, R]: with R < N all rows are forced, and the clamped index is never used.
    """
    rows = torch.arange(tokens.shape[1])
    last_logit = torch.full_like(greedy[:, :1], greedy.shape[1] - 1)
    proper = ancestors & (rows[None, :] != rows[:, None])
    parent = torch.where(proper, rows[None, None, :], torch.zeros_like(rows)[None, None, :]).amax(-1)  # [B, N]
    expected = torch.gather(greedy, 1, parent.minimum(last_logit))
    mismatch = ~((tokens == expected) | (rows[None, :] < forced[:, None]))
    related = ancestors.to(dtype)
    blocked = related @ mismatch.to(dtype)[:, :, None]  # [B, N, 1]: mismatches on the path
    own = (ancestors & (rows[None, :] == rows[:, None])).to(dtype).amax(-1)
    score = torch.where((blocked[:, :, 0] < 0.5) & (own > 0.5), related.sum(-1), torch.zeros((), dtype=dtype))
    return score.argmax(-1)


def close(
    tokens: Tensor,
    positions: Tensor,
    ancestors: Tensor,
    forced: Tensor,
    write_index: Tensor,
    draft_slots: Tensor,
    last_row: Tensor,
    next_token: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, ...]:
    """Return the emitted tokens and the next step's inputs on the same tree: ``step_io.CLOSING``, in that order.

    ``next_token`` is [B, 1]. The path to ``last_row`` has one accepted row at each depth 1, 2, …, so the row (and the token) at
    a depth is a maximum over rows. A slot without a forced row doesn't advance.
    """
    count, heads = tokens.shape[1], candidates.shape[1]
    rows = torch.arange(count)
    deep = torch.arange(1, heads + 1)
    depth = ancestors.to(torch.float32).sum(-1).to(torch.int64) - 1  # [B, N]; padding lies at -1
    accepted = torch.gather(depth, 1, last_row[:, None])  # [B, 1]
    active = forced[:, None] > 0
    zero, nothing = torch.zeros_like(accepted), torch.full_like(accepted, -1)
    on_path = torch.gather(ancestors, 1, last_row[:, None, None].expand(-1, -1, count))  # [B, 1, N]
    here = on_path & (depth[:, None, :] == deep[None, :, None])  # [B, K, N]
    kept = torch.where(here, rows[None, None, :], zero[:, :, None]).amax(-1)
    taken = torch.where(here, tokens[:, None, :], nothing[:, :, None]).amax(-1)
    taken = torch.cat([taken, nothing], dim=1)  # [B, K + 1]
    emitted = torch.where(torch.arange(heads + 1)[None, :] == accepted, next_token, taken)
    moved = torch.where(active, accepted + 1, zero)  # [B, 1]
    drafted = torch.gather(candidates.flatten(1), 1, draft_slots)
    return (
        torch.where(active, emitted, nothing),
        torch.where(rows[None, :] == 0, next_token, drafted),
        positions + moved,
        write_index + moved[:, 0],
        kept,
        torch.where(active, accepted, zero)[:, 0],
    )


class StepModule(nn.Module):
    """Backbone and heads with the inputs and outputs of :mod:`...runtime.executors.step_io`, those of the device graph included.

    Installs the tracing attention in the backbone. ``capacity``: tokens of a slot.
    """

    def __init__(self, backbone: Any, heads: HeadStack, margin: int, capacity: int) -> None:
        super().__init__()
        install(backbone)
        self.decoder = backbone.get_decoder()
        self.embedding = backbone.get_input_embeddings()
        self.projection = backbone.get_output_embeddings()
        self.change = heads.change
        self.heads = heads
        self.margin = margin
        self.capacity = capacity
        self.position_rows = position_rows(backbone)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        forced: Tensor,
        write_index: Tensor,
        columns: Tensor,
        logit_rows: Tensor,
        commit: Tensor,
        draft_slots: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        dtype = self.embedding.weight.dtype
        rows = self.position_rows
        # Drafts may reach beyond the capacity, which a table of positions needn't. Such rows are never accepted.
        reached = positions if rows is None else positions.clamp(max=rows - 1)

        def mask_of(window: int | None) -> Tensor:
            return visibility_mask(ancestors, write_index, columns, self.margin, dtype, positions, window)

        with tracing(TraceCache(past, write_index, commit, mask_of, self.capacity)) as cache:
            hidden = self.decoder(
                input_ids=tokens, position_ids=reached, past_key_values=cache, use_cache=True
            ).last_hidden_state
        width = hidden.shape[-1]
        hidden = torch.gather(hidden, 1, logit_rows[:, :, None].expand(-1, -1, width))  # [B, R, H]
        projected = self.projection(hidden)
        greedy = projected.argmax(-1)  # a scale or a cap changes no order
        logits = self.change(projected)
        last_row = accept(tokens, greedy, ancestors, forced, dtype)
        last_logit = last_row.minimum(torch.full_like(last_row, logit_rows.shape[1] - 1))[:, None]  # [B, 1]
        next_token = torch.gather(greedy, 1, last_logit)  # [B, 1]
        state = torch.gather(hidden, 1, last_logit[:, :, None].expand(-1, -1, width))  # [B, 1, H]
        candidates, log_probs = self.heads(state, self.embedding(next_token))
        closing = close(tokens, positions, ancestors, forced, write_index, draft_slots, last_row, next_token, candidates)
        return (last_row, next_token[:, 0], candidates, log_probs, logits, hidden, *closing, *cache.present_in_order())


class HeadsModule(nn.Module):
    """The heads alone, for rows that the host accepts (sampling): hidden [B, H] and root token [B] to candidates."""

    def __init__(self, heads: HeadStack, embedding: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = embedding

    def forward(self, hidden: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        candidates, log_probs = self.heads(hidden[:, None], self.embedding(root)[:, None])
        return candidates, log_probs
