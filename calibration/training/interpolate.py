"""Keeps as much of what the second stage learnt as a budget for quality allows.

On the line between a model and its tuned form, quality and the new skill change smoothly (M. Wortsman et al., Robust fine-tuning
of zero-shot models, arXiv 2109.01903, section 3). A low-rank adapter moves along that line by its scale. Heads move by their
weights, which began as those of the first stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...runtime.files.adapter_file import lora_config
from ...runtime.files.heads import HeadSet
from .finetune import Tuned

_TRIALS = 6


def share_within(budget: float, rise: Callable[[float], float]) -> float:
    """Find a large share (0 to 1, two digits) that raises perplexity by at most ``budget``.

    ``rise(share)``: perplexity at the share ÷ the backbone's perplexity - 1. Near the backbone its logarithm grows with the
    square of the share, which tells the next share to try. A rise within a tenth below the budget is near enough.
    """
    allowed, best, share = math.log1p(budget), 0.0, 1.0
    for _ in range(_TRIALS):
        found = math.log1p(rise(share))
        if found <= allowed:
            best = max(best, share)
            if best == 1 or found >= 0.9 * allowed:
                break
        step = math.sqrt(allowed / found) if found > 0 else math.inf
        share = min(1.0, math.floor(100 * 0.99 * share * step) / 100)
        if share <= best:
            break
    return best


def interpolate(start: HeadSet, tuned: Tuned, share: float) -> Tuned:
    """Go ``share`` of the way from ``start`` and no adapter to ``tuned``."""
    tensors = {name: _between(array, tuned.heads.tensors[name], share) for name, array in start.tensors.items()}
    shape = replace(tuned.shape, alpha=share * tuned.shape.alpha)
    return replace(
        tuned, heads=HeadSet(start.config, tensors), adapter=replace(tuned.adapter, config=lora_config(shape)), shape=shape
    )


def _between(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    if not np.issubdtype(start.dtype, np.floating):
        return start
    return ((1 - share) * start.astype(np.float32) + share * end.astype(np.float32)).astype(end.dtype)
