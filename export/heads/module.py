"""Computes Medusa heads as a torch module, built from the record that readers and the trainer share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.files.heads import HeadSet
from ..backbone.safetensors_header import StoredTensor

Change = Callable[[Tensor], Tensor]


def _tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Take numbers as they lie in memory or in a mapped file, if they have the right type: nobody changes them."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(dtype)


class HeadStack(nn.Module):
    """All heads, evaluated at one row per slot.

    ``forward(state, root)`` takes the backbone's normalised hidden state at the accepted row, ``state`` [B, 1, H], and the
    embedding of the token that the step emits there, ``root`` [B, 1, H]. It returns candidates int64 [B, K, k] and
    log-probabilities float32 [B, K, k], best first. Block: arXiv 2401.10774, section 2.1.1.
    """

    token_map: Tensor | None
    shared: nn.Module | None

    def __init__(
        self,
        heads: HeadSet,
        output_embedding: nn.Module,
        top_k: int,
        dtype: torch.dtype,
        change: Change | None = None,
        places: Mapping[int, StoredTensor] | None = None,
    ) -> None:
        """``output_embedding``: the backbone's projection. ``change``: what the backbone does to logits behind it.

        ``places``: of tensors in files, by their address in memory.
        """
        super().__init__()
        self.places = dict(places or {})
        self.change: Change = change or nn.Identity()
        config = heads.config
        self.config = config
        self.top_k = top_k
        self.blocks = nn.ModuleList()
        for head in range(config.num_heads):
            layers = nn.ModuleList()
            for layer in range(config.num_layers):
                weight, bias = (_tensor(array, dtype) for array in heads.layer(head, layer))
                linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
                linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
                layers.append(linear)
            self.blocks.append(layers)
        self.register_buffer("token_map", None if heads.token_map is None else torch.from_numpy(heads.token_map.copy()))
        self.shared = output_embedding if config.projection == "shared" else None
        self.projections = self._projections(heads, output_embedding, dtype)

    def project_through(self, output_embedding: nn.Module) -> None:
        """Share another module's vocabulary projection, if one is shared."""
        if self.shared is not None:
            self.shared = output_embedding

    def _projections(self, heads: HeadSet, output_embedding: nn.Module, dtype: torch.dtype) -> nn.ParameterList:
        """Make K own projections, one pruned projection for all heads, or none if they share the backbone's."""
        config = heads.config
        if config.projection == "shared":
            return nn.ParameterList()
        if config.projection == "own":
            arrays = [heads.tensors[f"head.{head}.projection.weight"] for head in range(config.num_heads)]
            tensors = [_tensor(array, dtype) for array in arrays]
        elif "projection.weight" in heads.tensors:
            tensors = [_tensor(heads.tensors["projection.weight"], dtype)]
        else:
            weight = cast(Tensor, output_embedding.weight).detach()
            tensors = [weight[torch.from_numpy(heads.tensors["token_map"])].to(dtype).clone()]
        return nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])

    def forward(self, state: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for layers in self.blocks:
            x = state
            for index, linear in enumerate(cast(nn.ModuleList, layers)):
                grounded = self.config.kind == "grounded" and index == 0
                x = x + functional.silu(linear(torch.cat([x, root], dim=-1) if grounded else x))
            outputs.append(x)
        if self.config.projection == "own":
            logits = torch.cat([functional.linear(x, w) for x, w in zip(outputs, self.projections, strict=True)], dim=1)
        else:
            stacked = torch.cat(outputs, dim=1)  # [B, K, H]: one product with the shared projection
            logits = self.shared(stacked) if self.shared is not None else functional.linear(stacked, self.projections[0])
        logits = self.change(logits.float())
        log_probs, indices = torch.topk(functional.log_softmax(logits, dim=-1), self.top_k, dim=-1)
        return (self.token_map[indices] if self.token_map is not None else indices), log_probs
