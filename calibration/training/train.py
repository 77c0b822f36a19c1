"""Trains Medusa-1: heads on a frozen backbone, from cached hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ...runtime.arguments import MAX_INTEGER, choice, settle
from ...runtime.errors import TrainingError
from ...runtime.files.heads import HeadConfig, HeadKind, HeadSet
from .checkpoint import resume_checkpoint, save_checkpoint
from .examples import Examples, draft_indices, draft_labels, draft_vocabulary
from .trainable import Change, TrainableHeads, check_trainable, loss_weights


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Sets a training run. Equal settings and data give equal heads on the same machine."""

    kind: HeadKind = "grounded"
    num_heads: int = 4
    num_layers: int = 1
    draft_vocab_size: int = 4096
    epochs: int = 8
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    seed: int = 0
    autocast: bool = False
    """Multiply in bfloat16: about twice as fast where the processor has instructions for it, much slower where not."""

    def __post_init__(self) -> None:
        counts = ("num_heads", "num_layers", "draft_vocab_size", "epochs", "batch_size")
        settle(self, dict.fromkeys(counts, (1, MAX_INTEGER)) | {"dropout": (0, 0.99)}, TrainingError)
        object.__setattr__(self, "kind", choice("kind", self.kind, get_args(HeadKind), "grounded"))


Progress = Callable[[int, int, float], None]


def train_heads(
    examples: Examples,
    embedding: Tensor,
    output_weight: Tensor,
    config: TrainConfig,
    *,
    start: HeadSet | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda step, total, loss: None,
    change: Change | None = None,
) -> HeadSet:
    """Train and return heads. ``embedding`` and ``output_weight``: the backbone's, [V, H]. ``change``: of its logits.

    ``start``: heads to go on from; None starts from zero. ``checkpoint``: a file that every epoch writes. A run with the same
    config goes on from it.

    Raises:
        TrainingError: the loss diverged, the checkpoint belongs to another config, or ``start`` has another shape.
    """
    torch.manual_seed(config.seed)
    if start is not None:
        _check_start(start, config, output_weight)
    known = None if start is None else start.token_map
    token_map = draft_vocabulary(examples.roots, config.draft_vocab_size) if known is None else torch.from_numpy(known)
    labels = draft_labels(examples.labels, draft_indices(token_map, len(output_weight)))
    form = HeadConfig(config.kind, config.num_heads, config.num_layers, output_weight.shape[1], len(token_map), "pruned")
    heads = TrainableHeads.on_backbone(
        form, embedding, output_weight, token_map, examples.hidden, examples.roots, config.dropout, change
    )
    if start is not None:
        heads.load(start)
    heads.to(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = max(1, len(labels) // config.batch_size)
    total = config.epochs * per_epoch
    rise = max(0.1, 2 / (total + 1))  # share of the run; torch divides by zero where it is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total + 1, pct_start=rise)
    state = {"heads": heads, "optimizer": optimizer, "schedule": schedule}
    settings = {**asdict(config), "start": None if start is None else start.digest()}
    first = 0 if checkpoint is None else resume_checkpoint(checkpoint, settings, state).get("epochs", 0)
    weights = loss_weights(config.num_heads).to(device)
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
                losses = heads.loss(hidden, roots, target)
            loss = (weights * losses).sum()
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
        if checkpoint is not None:
            save_checkpoint(checkpoint, settings, {"epochs": epoch + 1}, state)
    heads.eval()
    return heads.export(token_map)


def _check_start(start: HeadSet, config: TrainConfig, output_weight: Tensor) -> None:
    check_trainable(start, output_weight.shape[1], output_weight.shape[0])
    for name in ("kind", "num_heads", "num_layers", "draft_vocab_size"):
        has, wanted = getattr(start.config, name), getattr(config, name)
        if has != wanted:
            raise TrainingError(f"the heads to go on from have {name} {has!r}, not {wanted!r}", hint="leave the option out")
