"""Computes next-token distributions as log-probabilities, and the divergence of one from another.

Needs numpy alone. :mod:`.training.kl_loss` computes the same divergence in torch, with a gradient.
"""

from __future__ import annotations

import numpy as np

from ..runtime.errors import NumericsError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits [n, V] into log-probabilities float64 [n, V].

    Raises:
        NumericsError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise NumericsError("the engine returned NaN or infinite logits", hint="verify the bundle: medusa-deploy verify BUNDLE")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Compute KL(P‖Q) = Σ p · (log p − log q) in nats over the last axis of log-probabilities [.., V]: [..]."""
    divergence: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergence
