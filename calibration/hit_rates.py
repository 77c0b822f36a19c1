"""Finds where heads are right, and fits how sure they may be. :mod:`..runtime.drafting.hits` counts how often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.drafting.hits import MISS, NO_LABEL
from ..runtime.files.heads import HeadSet
from .training.examples import Examples
from .training.trainable import Change

_PRIOR = 1.0


@dataclass(frozen=True, slots=True)
class Hits:
    """Compares candidates with what the backbone emitted, at n positions.

    ``ranks`` int64 [n, K]: rank of each position's label among the candidates of each head, ``MISS`` or ``NO_LABEL``.
    ``log_probs`` float32 [n, K, k]: log-probabilities of the candidates, best first.
    """

    ranks: np.ndarray
    log_probs: np.ndarray


def head_logits(heads: HeadSet, head: int, hidden: Tensor, root_embedding: Tensor, projection: Tensor) -> Tensor:
    """Compute the draft logits [n, V'] of one head from the record's arrays. ``hidden`` and ``root_embedding``: [n, H]."""
    x = hidden
    for layer in range(heads.config.num_layers):
        weight, bias = (torch.from_numpy(array).to(hidden) for array in heads.layer(head, layer))
        grounded = heads.config.kind == "grounded" and layer == 0
        x = x + functional.silu(functional.linear(torch.cat([x, root_embedding], -1) if grounded else x, weight, bias))
    return functional.linear(x, projection)


def draft_projection(heads: HeadSet, head: int, output_weight: Tensor) -> Tensor:
    """Find the projection [V', H] of one head: its own, that of all heads, or the backbone's rows in the draft vocabulary."""
    for name in (f"head.{head}.projection.weight", "projection.weight"):
        if name in heads.tensors:
            return torch.from_numpy(heads.tensors[name]).float().to(output_weight.device)
    return (output_weight if heads.token_map is None else output_weight[torch.from_numpy(heads.token_map)]).float()


def find_hits(
    heads: HeadSet,
    examples: Examples,
    embedding: Tensor,
    output_weight: Tensor,
    ranks: int = 10,
    batch: int = 2048,
    device: str = "cpu",
    change: Change | None = None,
) -> Hits:
    """Look for each position's labels among the ``ranks`` best candidates of each head, computed on a torch ``device``.

    A label outside the draft vocabulary is a miss. ``change``: what the backbone does to logits behind its projection.
    """
    tokens = np.arange(len(output_weight)) if heads.token_map is None else heads.token_map
    token_map, embedding, output_weight = torch.from_numpy(tokens).to(device), embedding.to(device), output_weight.to(device)
    count, positions = heads.config.num_heads, len(examples.roots)
    projections = [draft_projection(heads, head, output_weight) for head in range(count)]
    found = Hits(np.full((positions, count), NO_LABEL), np.empty((positions, count, ranks), np.float32))
    with torch.no_grad():
        for start in range(0, positions, batch):
            part = slice(start, start + batch)
            hidden, roots = examples.hidden[part].to(device).float(), embedding[examples.roots[part].to(device)].float()
            labels = examples.labels[part].to(device)
            for head in range(count):
                logits = head_logits(heads, head, hidden, roots, projections[head])
                best = (logits if change is None else change(logits)).log_softmax(-1).topk(ranks, -1)
                hits = (token_map[best.indices] == labels[:, head : head + 1]).cpu().numpy()
                rank = np.where(hits.any(1), hits.argmax(1), MISS)
                found.ranks[part, head] = np.where(labels[:, head].cpu().numpy() >= 0, rank, NO_LABEL)
                found.log_probs[part, head] = best.values.cpu().numpy()
    return found


def platt_scaling(found: Hits, iterations: int = 30) -> list[tuple[float, float]]:
    """Fit a slope and an offset for each head::

        log-odds that a candidate is right = slope · log-odds of its probability + offset

    Logistic regression over all candidates (J. Platt, Probabilistic outputs for support vector machines, 1999), at positions
    where the heads before were right: only there a head's candidates count. A weak prior holds slope 1 and offset 0 where there
    is nothing to learn from.
    """
    scaling = []
    for head in range(found.ranks.shape[1]):
        counts = (found.ranks[:, :head] >= 0).all(1) & (found.ranks[:, head] != NO_LABEL)
        log_probs = found.log_probs[counts, head].astype(np.float64)
        odds = log_probs - np.log(np.maximum(-np.expm1(log_probs), 1e-6))
        right = found.ranks[counts, head, None] == np.arange(log_probs.shape[1])
        slope, offset = _logistic_regression(odds.ravel(), right.ravel(), iterations)
        scaling.append((round(max(slope, 0.0), 4), round(offset, 4)))
    return scaling


def _logistic_regression(x: np.ndarray, y: np.ndarray, iterations: int) -> tuple[float, float]:
    """Find slope and offset of the largest posterior by Newton's method with step halving. Priors: normal, around 1 and 0."""
    prior = np.array([1.0, 0.0])
    features = np.stack([x, np.ones_like(x)], 1)

    def loss(weights: np.ndarray) -> float:
        z = features @ weights
        return float(np.sum(np.logaddexp(0, z) - y * z) + _PRIOR / 2 * np.sum((weights - prior) ** 2))

    weights = prior.copy()
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-(features @ weights).clip(-30, 30)))
        gradient = features.T @ (p - y) + _PRIOR * (weights - prior)
        curvature = (features * (p * (1 - p))[:, None]).T @ features + _PRIOR * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
    return float(weights[0]), float(weights[1])
