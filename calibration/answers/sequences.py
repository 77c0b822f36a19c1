"""Joins prompts with their answers, as the backbone sees them whole, in batches with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...runtime.errors import TrainingError
from ..training.examples import following_tokens
from .answers import iter_shards

_BUCKET = 64  # sequences sorted by length together: enough for little padding, too few to always meet the same ones


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """Holds ``prompt`` and ``tokens`` (int64 ids), and ``hidden`` float16 [n, H]: the backbone's row i emitted token i."""

    prompt: np.ndarray
    tokens: np.ndarray
    hidden: np.ndarray

    def __len__(self) -> int:
        """Count the tokens that the backbone reads: the last one of the answer is only a label."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Holds padded sequences, and the labels of the n positions that emit an answer's tokens.

    ``ids`` int64 [B, L] are padded at the end: with causal attention nothing looks there. ``rows`` int64 [n]: the positions, of
    B · L. ``roots`` int64 [n]: tokens emitted there. ``labels`` int64 [n, K]: tokens after them, IGNORE past an answer's end.
    ``hidden`` float16 [n, H]: states of the backbone that answered.
    """

    ids: Tensor
    rows: Tensor
    roots: Tensor
    labels: Tensor
    hidden: Tensor


def load_sequences(folder: Path, prompts: Sequence[Sequence[int]]) -> list[AnsweredPrompt]:
    """Read all answers in ``folder`` and join them with their prompts (token ids, by the index that the answers have).

    Raises:
        TrainingError: there are none, or they belong to other prompts.
    """
    sequences = []
    for shard in iter_shards(folder):
        for answer in shard:
            if answer.question >= len(prompts):
                raise TrainingError(
                    f"{folder} answers prompt {answer.question + 1}, and there are {len(prompts)}",
                    hint="give another --work folder",
                )
            sequences.append(AnsweredPrompt(np.asarray(prompts[answer.question], np.int64), answer.tokens, answer.hidden))
    if not sequences:
        raise TrainingError(f"{folder} holds no answers", hint="generate them first")
    return sequences


def plan_batches(lengths: Sequence[int], batch_tokens: int, seed: int) -> list[list[int]]:
    """Put every sequence into one batch of at most ``batch_tokens`` positions, padding included, or of one sequence."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), _BUCKET):
        batch: list[int] = []
        for index in sorted(order[start : start + _BUCKET], key=lambda index: lengths[index]):
            # Lengths rise, so the newest sequence sets the width of the batch.
            if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    return [batches[index] for index in rng.permutation(len(batches))]


def make_batch(sequences: Sequence[AnsweredPrompt], num_heads: int) -> Batch:
    """Put sequences side by side."""
    width = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), width), np.int64)
    rows = []
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence)] = np.concatenate([sequence.prompt, sequence.tokens[:-1]])
        # The last token of the prompt emits the first one of the answer.
        first = index * width + len(sequence.prompt) - 1
        rows.append(np.arange(first, first + len(sequence.tokens)))
    parts = (
        np.concatenate(rows),
        np.concatenate([sequence.tokens for sequence in sequences]),
        np.concatenate([following_tokens(sequence.tokens, num_heads) for sequence in sequences]),
        np.concatenate([sequence.hidden for sequence in sequences]),
    )
    return Batch(torch.from_numpy(ids), *(torch.from_numpy(part) for part in parts))
