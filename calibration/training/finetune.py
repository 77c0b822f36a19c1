"""Trains Medusa-2: a LoRA adapter on the backbone together with the heads, which come from the first stage.

The loss (arXiv 2401.10774, section 2.2.2), at the positions that emit the backbone's own answers::

    KL(backbone ‖ tuned backbone) + λ0 · Σ_k λ_k · cross-entropy of head k

The backbone's cached hidden states give its distributions, so it isn't run again. Both learning rates rise over the warm-up and
fall along a cosine. The heads' rate is ``heads_rate`` times the adapter's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.arguments import settle
from ...runtime.errors import TrainingError
from ...runtime.files.adapter_file import AdapterFiles, LoraShape
from ...runtime.files.heads import HeadSet
from ..answers.sequences import AnsweredPrompt, Batch, make_batch, plan_batches
from .adapter import adapter_files, adapter_parameters, add_adapter
from .checkpoint import resume_checkpoint, save_checkpoint
from .examples import draft_indices, draft_labels
from .kl_loss import kl_loss
from .trainable import Change, TrainableHeads, check_trainable, loss_weights

_REPORTED = 20  # steps that a point of the curve averages


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """Sets the second stage. Without a time limit, equal settings and data give equal results on the same machine.

    ``batch_tokens``: positions a step, prompts and padding included. ``heads_weight``: λ0. ``kl_share``: share of a step's
    positions whose divergence is taken; two projections to a large vocabulary are much of a small backbone's step. ``warmup``:
    share of the run, but at least ``warmup_steps``: under a time limit a share can be a few steps. ``time_limit``: minutes after
    which training ends. The schedule ends with the data or the time, whichever comes first.
    """

    rank: int = 16
    alpha: float = 32.0
    epochs: int = 1
    batch_tokens: int = 1024
    learning_rate: float = 5e-4
    heads_rate: float = 4.0
    heads_weight: float = 0.2
    kl_share: float = 0.25
    warmup: float = 0.05
    warmup_steps: int = 50
    weight_decay: float = 0.0
    dropout: float = 0.1
    clip: float = 1.0
    checkpoint_steps: int = 50
    time_limit: float | None = None
    seed: int = 0
    autocast: bool = False

    def __post_init__(self) -> None:
        settle(self, {}, TrainingError)
        _check(self)


@dataclass(frozen=True, slots=True)
class StepReport:
    """Reports means over the last steps: ``divergence`` and ``head_losses`` in nats.

    ``tokens``: read by the backbone so far. ``share``: of the schedule, 0 to 1. ``seconds``: of training, without interruptions.
    """

    step: int
    total: int
    share: float
    seconds: float
    tokens: int
    divergence: float
    head_losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tuned:
    """Holds the heads, the adapter that they need, its shape, and one :class:`StepReport` every 20 steps."""

    heads: HeadSet
    adapter: AdapterFiles
    shape: LoraShape
    curve: list[dict[str, Any]]


def finetune(
    module: Any,
    backbone: str,
    start: HeadSet,
    sequences: Sequence[AnsweredPrompt],
    config: FinetuneConfig,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Callable[[StepReport], None] = lambda report: None,
    change: Change | None = None,
) -> Tuned:
    """Train an adapter on ``module`` (a transformers causal LM, changed in place) and heads that begin as ``start``.

    ``backbone``: digest of ``module`` as it is. ``checkpoint``: a file that is written every ``checkpoint_steps``. A run with the
    same settings and data goes on from it. ``change``: what ``module`` does to logits behind its projection.

    Raises:
        TrainingError: a loss diverged, the heads don't fit, or the checkpoint belongs to another run.
    """
    run = _Run(module, start, sequences, config, device, change)
    lengths = [len(sequence) for sequence in sequences]
    epochs = (plan_batches(lengths, config.batch_tokens, config.seed * 1000 + epoch) for epoch in range(config.epochs))
    plan = [batch for epoch in epochs for batch in epoch]
    # The limit may change: a run that gets more time is still the same run.
    settings = {**asdict(config), "time_limit": None, "start": start.digest(), "backbone": backbone, "steps": len(plan)}
    done = {} if checkpoint is None else resume_checkpoint(checkpoint, settings, run.parts)
    first, before, tokens = int(done.get("steps", 0)), float(done.get("seconds", 0.0)), int(done.get("tokens", 0))
    curve: list[dict[str, Any]] = list(done.get("curve", []))
    recent: list[Tensor] = [torch.tensor(row) for row in done.get("recent", [])]
    limit = math.inf if config.time_limit is None else 60 * config.time_limit
    started, step = time.monotonic(), first

    def save() -> None:
        if checkpoint is not None:
            state = {"steps": step, "seconds": seconds, "tokens": tokens, "curve": curve, "recent": [r.tolist() for r in recent]}
            save_checkpoint(checkpoint, settings, state, run.parts)

    seconds = before
    while step < len(plan) and seconds < limit:
        chosen = [sequences[index] for index in plan[step]]
        share = max(step / len(plan), seconds / limit)
        losses = run.step(make_batch(chosen, start.config.num_heads), config.seed * 1_000_003 + step, _rate(share, step, config))
        step += 1
        tokens += sum(len(sequence) for sequence in chosen)
        seconds = before + time.monotonic() - started
        if not torch.isfinite(losses).all():
            raise TrainingError(
                f"the losses are {losses.tolist()} at step {step}", hint="lower --learning-rate, and remove the checkpoint"
            )
        recent.append(losses)
        if len(recent) == _REPORTED or step == len(plan) or seconds >= limit:
            mean = torch.stack(recent).mean(0).tolist()
            recent.clear()
            share = min(1.0, max(step / len(plan), seconds / limit))
            report = StepReport(step, len(plan), share, seconds, tokens, mean[0], tuple(mean[1:]))
            curve.append({**asdict(report), "head_losses": mean[1:]})
            progress(report)
        if step % config.checkpoint_steps == 0:
            save()
    if step > first and step % config.checkpoint_steps:
        save()
    return Tuned(run.heads.eval().export(run.token_map), adapter_files(module, run.lora, backbone), run.lora, curve)


class _Run:
    """Owns what a step changes: the adapter, the heads, and the optimiser of both."""

    def __init__(
        self,
        module: Any,
        start: HeadSet,
        sequences: Sequence[AnsweredPrompt],
        config: FinetuneConfig,
        device: str,
        change: Change | None,
    ) -> None:
        output = module.get_output_embeddings()
        embedding = module.get_input_embeddings().weight.detach()
        check_trainable(start, output.weight.shape[1], output.weight.shape[0])
        assert start.token_map is not None
        torch.manual_seed(config.seed)
        self.config, self.device, self.change = config, torch.device(device), change
        self.token_map = torch.from_numpy(start.token_map)
        self.lora = add_adapter(module, config.rank, config.alpha)
        self.module = module.eval().to(device)
        self.to_draft = draft_indices(self.token_map, len(output.weight))
        roots = torch.cat([torch.from_numpy(sequence.tokens) for sequence in sequences])
        self.heads = TrainableHeads.on_backbone(
            start.config, embedding, output.weight.detach(), self.token_map, _sample(sequences), roots, config.dropout, change
        )
        self.heads.load(start)
        self.heads.to(device).train()
        self.adapter = adapter_parameters(module)
        rates = ({"params": self.adapter, "lr": 0.0}, {"params": self.heads.parameters(), "lr": 0.0})
        self.optimizer = torch.optim.AdamW(rates, weight_decay=config.weight_decay)
        self.parts = {"adapter": self.adapter, "heads": self.heads, "optimizer": self.optimizer}
        self.weights = loss_weights(start.config.num_heads).to(device)

    def step(self, batch: Batch, seed: int, rate: float) -> Tensor:
        """Take one step, random by ``seed`` alone. Returns the losses before it, float32 [1 + K]: divergence, heads."""
        torch.manual_seed(seed)
        config = self.config
        for group, factor in zip(self.optimizer.param_groups, (1.0, config.heads_rate), strict=True):
            group["lr"] = rate * factor * config.learning_rate
        chosen = torch.randperm(len(batch.rows))[: max(1, round(config.kl_share * len(batch.rows)))]
        output = self.module.get_output_embeddings()
        labels = draft_labels(batch.labels, self.to_draft).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast):
            states = self.module.base_model(input_ids=batch.ids.to(self.device), use_cache=False).last_hidden_state
            hidden = states.flatten(0, 1)[batch.rows.to(self.device)].float()
            heads = self.heads.loss(hidden, batch.roots.to(self.device), labels)
        teacher = batch.hidden[chosen].to(self.device)
        divergence = kl_loss(hidden[chosen.to(self.device)], teacher, output.weight, output.bias, self.change)
        loss = divergence + config.heads_weight * (self.weights * heads).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameters in (self.adapter, self.heads.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        self.optimizer.step()
        return torch.cat([divergence.detach()[None], heads.detach()]).cpu()


def _sample(sequences: Sequence[AnsweredPrompt], rows: int = 65536) -> Tensor:
    """Join the hidden states of the first sequences: enough to measure their size."""
    kept: list[Tensor] = []
    for sequence in sequences:
        kept.append(torch.from_numpy(sequence.hidden))
        rows -= len(sequence.hidden)
        if rows <= 0:
            break
    return torch.cat(kept)


def _rate(share: float, step: int, config: FinetuneConfig) -> float:
    """Compute the factor of both rates. It rises to 1 over the warm-up and then falls to 0 along a cosine."""
    rise = min(1.0, share / config.warmup, step / config.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, share - config.warmup) / (1 - config.warmup)))
    return max(rise, 1e-3) * fall


def _check(config: FinetuneConfig) -> None:
    positive = ("rank", "alpha", "epochs", "batch_tokens", "learning_rate", "heads_weight", "warmup_steps", "checkpoint_steps")
    bad = [f"{name} is {getattr(config, name)}" for name in positive if not getattr(config, name) > 0]
    shares = {"kl_share": (0, 1), "warmup": (0, 0.9), "dropout": (-1e-9, 0.99)}
    values = {name: getattr(config, name) for name in shares}
    bad += [f"{name} is {values[name]}" for name, (low, high) in shares.items() if not low < values[name] <= high]
    if config.time_limit is not None and not config.time_limit > 0:
        bad.append(f"time_limit is {config.time_limit}")
    if bad:
        raise TrainingError(", ".join(bad), hint="see: medusa-deploy train --help")
