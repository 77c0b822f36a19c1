"""Makes heads a module that learns, over a frozen draft projection, with the loss that both stages of training share.

The loss is the cross-entropy of head k against the token k + 2 places ahead, weighted 0.8^k (arXiv 2401.10774, section 2.2.1,
λ_k).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.errors import TrainingError
from ...runtime.files.heads import HeadConfig, HeadSet
from .examples import IGNORE, root_mean_square

LOSS_DECAY = 0.8
Change = Callable[[Tensor], Tensor]
"""What a backbone does to its logits behind the projection: a scale, a soft cap. Heads' logits get the same."""


class TrainableHeads(nn.Module):
    """Residual blocks of all heads over a frozen draft projection [V', H]. Blocks start as the identity.

    Blocks learn from inputs of unit size. An embedding can be a tenth of a hidden state in every dimension; an optimiser that
    moves all weights alike would take ten times as long to use it. ``hidden_rms`` and ``embedding_rms`` float32 [H] are the
    sizes of the inputs. :meth:`export` folds them into the weights, and :meth:`load` takes them out again.
    """

    embedding: Tensor
    projection: Tensor
    hidden_rms: Tensor
    embedding_rms: Tensor

    def __init__(
        self,
        config: HeadConfig,
        embedding: Tensor,
        projection: Tensor,
        hidden_rms: Tensor,
        embedding_rms: Tensor,
        dropout: float = 0.0,
        change: Change | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.change: Change = change or nn.Identity()
        self.register_buffer("hidden_rms", hidden_rms, persistent=False)
        self.register_buffer("embedding_rms", embedding_rms, persistent=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("projection", projection, persistent=False)
        self.dropout = nn.Dropout(dropout)
        hidden = projection.shape[1]
        widths = [2 * hidden if config.kind == "grounded" and layer == 0 else hidden for layer in range(config.num_layers)]
        self._layers = [[nn.Linear(width, hidden) for width in widths] for _ in range(config.num_heads)]
        self.blocks = nn.ModuleList(nn.ModuleList(layers) for layers in self._layers)
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def on_backbone(
        cls,
        config: HeadConfig,
        embedding: Tensor,
        output_weight: Tensor,
        token_map: Tensor,
        hidden: Tensor,
        roots: Tensor,
        dropout: float,
        change: Change | None = None,
    ) -> TrainableHeads:
        """Make heads over the rows of a backbone's output weight that ``token_map`` int64 [V'] names.

        ``embedding`` and ``output_weight`` [V, H] are the backbone's, and so is what it does to logits behind its projection:
        ``change``. ``hidden`` [n, H] and ``roots`` int64 are training data.
        """
        sizes = root_mean_square(hidden), root_mean_square(embedding[torch.unique(roots)])
        return cls(config, embedding.float(), output_weight[token_map].float(), *sizes, dropout, change)

    def forward(self, hidden: Tensor, roots: Tensor) -> list[Tensor]:
        """Compute the draft logits [n, V'] of each head. ``hidden`` [n, H], ``roots`` int64 [n]."""
        grounding = functional.embedding(roots, self.embedding) / self.embedding_rms if self.config.kind == "grounded" else None
        outputs = []
        for layers in self._layers:
            x = hidden
            for index, linear in enumerate(layers):
                source = x / self.hidden_rms
                if grounding is not None and index == 0:
                    source = torch.cat([source, grounding], -1)
                x = x + functional.silu(linear(self.dropout(source)))
            outputs.append(self.change(functional.linear(x, self.projection)))
        return outputs

    def loss(self, hidden: Tensor, roots: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy of each head, float32 [K]. ``labels`` int64 [n, K] are draft indices or IGNORE."""
        outputs = self(hidden, roots)
        return torch.stack([_mean_loss(logits.float(), labels[:, head]) for head, logits in enumerate(outputs)])

    def export(self, token_map: Tensor) -> HeadSet:
        """Return the record that the exporter reads, in float16."""
        tensors: dict[str, np.ndarray] = {"token_map": token_map.cpu().numpy()}
        for head, layers in enumerate(self._layers):
            for layer, linear in enumerate(layers):
                weight = linear.weight.detach() / self._sizes(linear)
                tensors[f"head.{head}.layer.{layer}.weight"] = weight.cpu().half().numpy()
                tensors[f"head.{head}.layer.{layer}.bias"] = linear.bias.detach().cpu().half().numpy()
        return HeadSet(self.config, tensors)

    def load(self, heads: HeadSet) -> None:
        """Go on from a record of the same config."""
        with torch.no_grad():
            for head, layers in enumerate(self._layers):
                for layer, linear in enumerate(layers):
                    weight, bias = (torch.from_numpy(array).to(linear.weight) for array in heads.layer(head, layer))
                    linear.weight.copy_(weight * self._sizes(linear))
                    linear.bias.copy_(bias)

    def _sizes(self, linear: nn.Linear) -> Tensor:
        """Return the size of each input of a block's weight."""
        return torch.cat([self.hidden_rms, self.embedding_rms][: linear.in_features // len(self.hidden_rms)])


def loss_weights(num_heads: int) -> Tensor:
    """Return λ_k = 0.8^k, float32 [K]."""
    return torch.tensor([LOSS_DECAY**head for head in range(num_heads)])


def check_trainable(heads: HeadSet, hidden_size: int, vocab_size: int) -> None:
    """Check that training can go on from these heads, over this backbone.

    Raises:
        TrainingError: they project through weights of their own, or belong to another backbone.
    """
    config, token_map = heads.config, heads.token_map
    if config.projection != "pruned" or token_map is None or "projection.weight" in heads.tensors:
        raise TrainingError(
            f"these heads have a projection of the kind {config.projection!r}, with weights of their own or over all tokens",
            hint="go on from heads that `medusa-deploy train` made: they draft from rows of the backbone's own projection",
        )
    if config.hidden_size != hidden_size or token_map.max() >= vocab_size:
        raise TrainingError(
            f"the heads have the hidden size {config.hidden_size} and token ids up to {token_map.max()}; the backbone has "
            f"the hidden size {hidden_size} and {vocab_size} tokens",
            hint="heads belong to the backbone that they were trained on: give that one, or its heads",
        )


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy per row that has a label; 0 if none has one (a batch of short answers, a late head)."""
    total = functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)
