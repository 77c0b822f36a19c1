"""Measures perplexity: how well a causal LM predicts given tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ...runtime.errors import TrainingError


def perplexity(module: Any, sequences: Iterable[tuple[Sequence[int], int]], device: str = "cpu") -> float:
    """Compute exp of the mean negative log-likelihood in nats over all predicted tokens of all sequences.

    ``sequences``: token ids, and the number of them (at least 1) that are given and not predicted.

    Raises:
        TrainingError: nothing is predicted, or the result isn't finite.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, given in sequences:
            assert given >= 1
            if len(tokens) <= given:
                continue
            ids = torch.tensor([list(tokens)], device=device)
            predicted = len(tokens) - given
            logits = module(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=predicted).logits[0, -predicted:]
            total += float(functional.cross_entropy(logits.float(), ids[0, given:], reduction="sum"))
            count += predicted
    if not count or not math.isfinite(total):
        raise TrainingError(f"the log-likelihood of {count} tokens is {total}", hint="give longer texts, and check the weights")
    return math.exp(total / count)
