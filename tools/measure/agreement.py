"""Measures how alike two backbones predict one text: feeds both the same tokens and compares every next-token distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from ...calibration.distributions import kl_divergence, log_softmax
from ...runtime.errors import UsageError
from ...runtime.session import Session
from .probe import Probe

_KL_EDGES = tuple(float(f"{10 ** (half / 2):.2g}") for half in range(-13, 3))
_MARGIN_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_BINS = 16


@dataclass(frozen=True, slots=True)
class _Found:
    """Holds facts of n positions, arrays [n]. ``index`` counts positions from the first predicted token of their text.

    ``nll_a`` and ``nll_b``: −log of the next token's probability, in nats. ``kl``: KL(A‖B) in nats. ``same``: both have the same
    argmax. ``margin``: lead of A's best token over its second, in nats.
    """

    index: np.ndarray
    nll_a: np.ndarray
    nll_b: np.ndarray
    kl: np.ndarray
    same: np.ndarray
    margin: np.ndarray

    @classmethod
    def at(cls, a: np.ndarray, b: np.ndarray, labels: Sequence[int], first: int) -> Self:
        """Compare logits [n, V] of both sides. ``labels``: the n tokens that come."""
        log_a, log_b = log_softmax(a), log_softmax(b)
        rows = np.arange(len(labels))
        second, best = np.partition(log_a, -2, axis=1)[:, -2:].T
        return cls(
            index=first + rows,
            nll_a=-log_a[rows, labels],
            nll_b=-log_b[rows, labels],
            kl=np.maximum(kl_divergence(log_a, log_b), 0.0),  # rounding leaves −1e-17
            same=log_a.argmax(1) == log_b.argmax(1),
            margin=best - second,
        )

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """Join the positions of all parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Predictions:
    """Collects what two backbones, of which A is the reference, predict at the same positions."""

    def __init__(self) -> None:
        self._parts: list[_Found] = []

    def add(self, a: np.ndarray, b: np.ndarray, labels: Sequence[int], first: int) -> None:
        """Compare logits [n, V] of both. ``labels``: the n tokens that come. ``first``: positions before."""
        self._parts.append(_Found.at(a, b, labels, first))

    def report(self) -> dict[str, Any]:
        """Report perplexities, divergence and agreement of the argmax over all positions read so far.

        A histogram counts values below its first edge, between two edges each, and from the last edge on.

        Raises:
            UsageError: nothing was predicted.
        """
        if not self._parts:
            raise UsageError("the texts have no token to predict", hint="give longer prompts, or more tokens")
        found = _Found.together(self._parts)
        with np.errstate(over="ignore"):
            a, b = (float(np.exp(nll.mean())) for nll in (found.nll_a, found.nll_b))
        apart = found.margin[~found.same]
        return {
            "positions": len(found.kl),
            "perplexity": {"a": a, "b": b, "increase_percent": 100 * (b / a - 1)},
            "kl_nats": {
                "mean": float(found.kl.mean()),
                "median": float(np.median(found.kl)),
                "p99": float(np.percentile(found.kl, 99)),
                "largest": float(found.kl.max()),
                "histogram": {"edges": list(_KL_EDGES), "counts": _histogram(found.kl, _KL_EDGES)},
            },
            "argmax_agreement": {"share": float(found.same.mean()), "disagreeing": len(apart)},
            "margin_nats": {
                "disagreeing": _quantiles(apart),
                "agreeing": _quantiles(found.margin[found.same]),
                "histogram": {
                    "edges": list(_MARGIN_EDGES),
                    "disagreeing": _histogram(apart, _MARGIN_EDGES),
                    "agreeing": _histogram(found.margin[found.same], _MARGIN_EDGES),
                },
            },
            "by_position": _by_position(found),
        }


class Agreement(Predictions):
    """Reads texts with two sessions of one vocabulary, of which A is the reference."""

    def __init__(self, a: Session, b: Session, rows: int) -> None:
        """``rows``: the most rows of a step. 1 computes every position as plain decoding does."""
        super().__init__()
        self._sessions = (a, b)
        self._most = min(rows, a.max_rows, b.max_rows)

    def read(self, tokens: Sequence[int], given: int) -> None:
        """Compare both predictions of ``tokens[given:]``. The first token is given in any case.

        Each side computes the given tokens as a prefill and the others in steps. Numbers of rows are powers of two: buffers are
        kept for each. With padding instead, a variant that scales activations by the step would round otherwise.
        """
        at = max(1, given)
        with Probe(self._sessions[0]) as a, Probe(self._sessions[1]) as b:
            for probe in (a, b):
                probe.restart(tokens[: at - 1])
            first = at
            while at < len(tokens):
                rows = 1 << (min(self._most, len(tokens) - at).bit_length() - 1)
                fed, labels = tokens[at - 1 : at - 1 + rows], tokens[at : at + rows]
                self.add(a.chain_logits(fed), b.chain_logits(fed), labels, at - first)
                at += rows


def _histogram(values: np.ndarray, edges: Sequence[float]) -> list[int]:
    counts: list[int] = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()
    return counts


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    shares = {"p10": 10, "median": 50, "p90": 90, "largest": 100}
    return {name: float(np.percentile(values, share)) for name, share in shares.items()}


def _by_position(found: _Found) -> list[dict[str, Any]]:
    """Report the agreement of the argmax by the position in the text, in bins of equal width: [from, to)."""
    end = int(found.index.max()) + 1
    width = -(-end // _BINS)
    bins = []
    for start in range(0, end, width):
        inside = (found.index >= start) & (found.index < start + width)
        share = float(found.same[inside].mean()) if inside.any() else None
        bins.append({"from": start, "to": min(start + width, end), "positions": int(inside.sum()), "share": share})
    return bins
