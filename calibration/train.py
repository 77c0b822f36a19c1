"""Medusa-1: train heads on a frozen backbone from cached hidden states.

Loss: cross-entropy of head k against the token k + 2 places ahead, weighted 0.8^k (arXiv 2401.10774, section 2.2.1, λ_k).
Position i of an answer has the hidden state that emitted token i, so head k's label is token i + 1 + k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import TrainingError
from ..runtime.heads import HeadConfig, HeadKind, HeadSet
from .distill import iter_shards

IGNORE = -100
LOSS_DECAY = 0.8


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a training run; equal settings and data give equal heads on the same machine."""

    kind: HeadKind = "grounded"
    num_heads: int = 4
    num_layers: int = 1
    draft_vocab_size: int = 4096
    epochs: int = 4
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    seed: int = 0
    autocast: bool = False
    """Multiply in bfloat16: about twice as fast where the processor has instructions for it, much slower where not."""


@dataclass(frozen=True, slots=True)
class Examples:
    """``hidden`` float16 [n, H], ``roots`` int64 [n], ``labels`` int64 [n, K] token ids, IGNORE past the end of an answer."""

    hidden: Tensor
    roots: Tensor
    labels: Tensor


Progress = Callable[[int, int, float], None]


def load_examples(folder: Path, num_heads: int) -> Examples:
    """Examples of all answers in ``folder``.

    Raises:
        TrainingError: there are none.
    """
    hidden, roots, labels = [], [], []
    for shard in iter_shards(folder):
        for answer in shard:
            tokens = np.concatenate([answer.tokens, np.full(num_heads, IGNORE)])
            windows = np.lib.stride_tricks.sliding_window_view(tokens[1:], num_heads)
            hidden.append(answer.hidden)
            roots.append(answer.tokens)
            labels.append(windows[: len(answer.tokens)])
    if not hidden:
        raise TrainingError(f"{folder} holds no answers", hint="generate them first")
    return Examples(*(torch.from_numpy(np.concatenate(part)) for part in (hidden, roots, labels)))


def draft_vocabulary(tokens: Tensor, size: int) -> Tensor:
    """The ``size`` most frequent token ids (ties: smaller id first), ascending, int64 [≤ size]."""
    values, counts = torch.unique(tokens[tokens >= 0], return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)[:size]
    return torch.sort(values[order])[0]


def root_mean_square(rows: Tensor) -> Tensor:
    """Typical size of each dimension of ``rows`` [n, H], float32 [H]; 1 where a dimension is always 0."""
    total = torch.zeros(rows.shape[1])
    for start in range(0, len(rows), 4096):  # a float32 copy of all rows would be the largest thing in memory
        total += rows[start : start + 4096].float().square().sum(0)
    size = (total / len(rows)).sqrt()
    return torch.where(size > 0, size, torch.ones(()))


class TrainableHeads(nn.Module):
    """Residual blocks of all heads over a frozen draft projection [V', H]; blocks start as the identity.

    Blocks learn from inputs of unit size: an embedding can be a tenth of a hidden state in every dimension, and an optimiser
    that moves all weights alike would take ten times as long to use it. ``hidden_rms`` and ``embedding_rms`` are those sizes,
    float32 [H]; :meth:`export` folds them into the weights.
    """

    embedding: Tensor
    projection: Tensor
    hidden_rms: Tensor
    embedding_rms: Tensor

    def __init__(
        self, config: TrainConfig, embedding: Tensor, projection: Tensor, hidden_rms: Tensor, embedding_rms: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("hidden_rms", hidden_rms, persistent=False)
        self.register_buffer("embedding_rms", embedding_rms, persistent=False)
        hidden = projection.shape[1]
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("projection", projection, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        widths = [2 * hidden if config.kind == "grounded" and layer == 0 else hidden for layer in range(config.num_layers)]
        self._layers = [[nn.Linear(width, hidden) for width in widths] for _ in range(config.num_heads)]
        self.blocks = nn.ModuleList(nn.ModuleList(layers) for layers in self._layers)
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, roots: Tensor) -> list[Tensor]:
        """Draft logits [n, V'] of each head; hidden [n, H], roots int64 [n]."""
        grounding = functional.embedding(roots, self.embedding) / self.embedding_rms if self.config.kind == "grounded" else None
        outputs = []
        for layers in self._layers:
            x = hidden
            for index, linear in enumerate(layers):
                source = x / self.hidden_rms
                if grounding is not None and index == 0:
                    source = torch.cat([source, grounding], -1)
                x = x + functional.silu(linear(self.dropout(source)))
            outputs.append(functional.linear(x, self.projection))
        return outputs

    def export(self, token_map: Tensor) -> HeadSet:
        """The record that the exporter reads, in float16."""
        tensors: dict[str, np.ndarray] = {"token_map": token_map.cpu().numpy()}
        for head, layers in enumerate(self._layers):
            for layer, linear in enumerate(layers):
                sizes = [self.hidden_rms, self.embedding_rms][: linear.weight.shape[1] // len(self.hidden_rms)]
                tensors[f"head.{head}.layer.{layer}.weight"] = (linear.weight.detach() / torch.cat(sizes)).cpu().half().numpy()
                tensors[f"head.{head}.layer.{layer}.bias"] = linear.bias.detach().cpu().half().numpy()
        config = self.config
        hidden = self.projection.shape[1]
        head_config = HeadConfig(config.kind, config.num_heads, config.num_layers, hidden, len(token_map), "pruned")
        return HeadSet(head_config, tensors)


def train_heads(
    examples: Examples,
    embedding: Tensor,
    output_weight: Tensor,
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda step, total, loss: None,
) -> HeadSet:
    """Train and return heads. ``embedding`` and ``output_weight``: the backbone's, [V, H].

    ``checkpoint``: a file written after every epoch; a run with the same config goes on from it.

    Raises:
        TrainingError: the loss diverged, or the checkpoint belongs to another config.
    """
    torch.manual_seed(config.seed)
    token_map = draft_vocabulary(examples.roots, config.draft_vocab_size)
    to_draft = torch.full((output_weight.shape[0],), IGNORE)
    to_draft[token_map] = torch.arange(len(token_map))
    labels = torch.where(examples.labels >= 0, to_draft[examples.labels.clamp(min=0)], IGNORE)
    sizes = root_mean_square(examples.hidden), root_mean_square(embedding[torch.unique(examples.roots)])
    heads = TrainableHeads(config, embedding.float(), output_weight[token_map].float(), *sizes).to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = max(1, len(labels) // config.batch_size)
    total = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total + 1, pct_start=0.1)
    state = {"heads": heads, "optimizer": optimizer, "schedule": schedule}
    first = _resume(checkpoint, config, state)
    weights = [LOSS_DECAY**head for head in range(config.num_heads)]
    heads.train()
    for epoch in range(first, config.epochs):
        # Order and dropout of an epoch depend on its number alone, so a run that goes on ends in the same heads.
        torch.manual_seed(config.seed * 1000 + epoch)
        order = torch.randperm(len(labels))
        for step in range(per_epoch):
            batch = order[step * config.batch_size : (step + 1) * config.batch_size]
            hidden, roots = examples.hidden[batch].to(device).float(), examples.roots[batch].to(device)
            target = labels[batch].to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.autocast):
                outputs = heads(hidden, roots)
            losses = [
                weight * _mean_loss(logits.float(), target[:, head])
                for head, (weight, logits) in enumerate(zip(weights, outputs, strict=True))
            ]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done = epoch * per_epoch + step + 1
            if done % 20 == 0 or done == total:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(f"the loss is {value} at step {done}", hint="lower --learning-rate")
                progress(done, total, value)
        _save(checkpoint, config, state, epoch + 1)
    heads.eval()
    return heads.export(token_map)


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy per row that has a label; 0 where none has (a batch of short answers, a late head)."""
    total = functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def _save(path: Path | None, config: TrainConfig, state: dict[str, Any], epoch: int) -> None:
    if path is None:
        return
    temporary = path.with_suffix(".partial")
    torch.save({"config": asdict(config), "epoch": epoch, **{name: part.state_dict() for name, part in state.items()}}, temporary)
    os.replace(temporary, path)


def _resume(path: Path | None, config: TrainConfig, state: dict[str, Any]) -> int:
    """Epochs already done."""
    if path is None or not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    if saved["config"] != asdict(config):
        raise TrainingError(f"{path} belongs to a run with other settings", hint="remove it, or train with the same settings")
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return int(saved["epoch"])
