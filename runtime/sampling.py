"""Chooses the next token from one row of the backbone's logits: the parameters and the arithmetic.

::

    logits ── logit bias, repetition, presence and frequency penalties ──▶ scores
    scores ── temperature, top-k, top-p, min-p ──▶ weights (unnormalised probabilities) ── draw ──▶ token

Filters keep tokens that tie with the last one kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np

from .arguments import is_integer, is_number, shown
from .errors import NumericsError, SamplingError

Mode = Literal["greedy", "sample", "typical"]
MODES = ("greedy", "sample", "typical")

_RANGES = {
    "temperature": (1e-5, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "typical_epsilon": (0.0, 1.0),
    "typical_delta": (0.0, 1.0),
}
_MAX_BIAS = 1e4
_BLOCK = 64
_USED_BY = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), ("sample", "typical")),
    **dict.fromkeys(("typical_epsilon", "typical_delta"), ("typical",)),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters that choose tokens.

    ``mode``: ``greedy`` emits the most likely token. ``sample`` draws from the backbone's distribution, exactly, with or without
    speculation. ``typical`` is Medusa's acceptance (arXiv 2401.10774, section 2.3.1), which is **lossy**: it accepts any drafted
    token that is likely enough.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``repetition_penalty`` (arXiv 1909.05858) covers prompt and emitted tokens;
    ``presence_penalty`` and ``frequency_penalty`` cover emitted tokens. ``logit_bias``: token id to the bias of its logit.
    Equal ``seed`` values give equal text with every tree. None takes a new seed for each request. None elsewhere is the default.
    """

    mode: Mode = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    typical_epsilon: float = 0.09
    typical_delta: float = 0.3

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            if value is None:
                object.__setattr__(self, name, {} if name == "logit_bias" else each.default)
            elif is_integer(value):  # numpy's numbers become Python's
                object.__setattr__(self, name, int(value))
            elif is_number(value):
                object.__setattr__(self, name, float(value))

    @property
    def plain_argmax(self) -> bool:
        """True if the argmax of the unchanged logits is the token: the graph can accept by itself."""
        return self.mode == "greedy" and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """True if a bias or a penalty is on."""
        return bool(self.logit_bias) or self.repetition_penalty != 1.0 or self.penalises_emitted

    @property
    def penalises_emitted(self) -> bool:
        """True if the presence or the frequency penalty is on."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def resolved(self) -> SamplingParams:
        """Returns the same parameters, with a random seed if mode ``sample`` has none. A request keeps them to its end."""
        if self.seed is not None or self.mode != "sample":
            return self
        import secrets

        return replace(self, seed=secrets.randbits(63))

    def validate(self, vocab_size: int) -> None:
        """Refuses values out of range, and values that the mode would ignore.

        Raises:
            SamplingError: a value is refused. The error has the parameter, its value and its range.
        """
        if self.mode not in MODES:
            raise SamplingError(f"mode is {self.mode!r}", hint=f"modes: {', '.join(MODES)}")
        if self.temperature == 0 and self.mode != "greedy":
            raise SamplingError(f"temperature is 0 in mode {self.mode!r}", hint='temperature 0 is mode="greedy"')
        for name, modes in _USED_BY.items():
            value = getattr(self, name)
            if self.mode not in modes and value != type(self).__dataclass_fields__[name].default:
                if name == "temperature" and value == 0:
                    continue
                raise SamplingError(
                    f"{name} is {value!r}, and mode {self.mode!r} does not use it", hint=f"set mode to {' or '.join(modes)}"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not is_number(value) or not (low <= value <= high or (name == "temperature" and value == 0)):
                raise SamplingError(f"{name} is {value!r}", hint=f"{name} is a number from {low:g} to {high:g}")
        if not is_integer(self.top_k) or self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k!r}", hint="top_k is a positive integer, or 0 for off")
        if self.seed is not None and not (is_integer(self.seed) and 0 <= self.seed < 1 << 64):
            raise SamplingError(f"seed is {self.seed!r}", hint="a seed is an integer from 0 to 2**64 - 1, or None")
        self._validate_bias(vocab_size)

    def _validate_bias(self, vocab_size: int) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias is {shown(self.logit_bias)}", hint="logit_bias maps token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not is_integer(token) or not 0 <= token < vocab_size:
                raise SamplingError(
                    f"logit_bias names token {token!r}", hint=f"token ids are integers from 0 to {vocab_size - 1}"
                )
            if not is_number(bias) or abs(bias) > _MAX_BIAS:
                raise SamplingError(
                    f"logit_bias of token {token} is {bias!r}", hint=f"a bias is a number of at most ±{_MAX_BIAS:g}"
                )


def scores(params: SamplingParams, logits: np.ndarray, context: Sequence[int], prompt_length: int) -> np.ndarray:
    """Applies bias and penalties to one row of logits [V]. Returns scores float32 [V]; ``logits`` stays unchanged.

    ``context``: all tokens before the one to choose; the first ``prompt_length`` are the prompt.

    Raises:
        NumericsError: a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits)))
        raise NumericsError(
            f"{bad} of {len(logits)} logits are NaN or infinite", hint="check the bundle's weights with: medusa-deploy verify"
        )
    if not params.changes_logits:
        return logits.astype(np.float32, copy=False)
    out = np.array(logits, np.float32)
    if params.logit_bias:
        out[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1.0:
        seen = np.asarray(context, np.int64)
        value = out[seen]
        # Assignment of gathered values: a token that occurs twice is penalised once.
        out[seen] = np.where(value < 0, value * params.repetition_penalty, value / params.repetition_penalty)
    if params.penalises_emitted:
        emitted, counts = np.unique(np.asarray(context[prompt_length:], np.int64), return_counts=True)
        out[emitted] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    return out


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities float32 [V] of logits [V]."""
    shifted = logits.astype(np.float32) - np.float32(logits.max())
    out: np.ndarray = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return out


def weights(params: SamplingParams, scores: np.ndarray) -> np.ndarray:
    """Returns unnormalised probabilities float32 [V] of scores [V]. The largest is 1; filtered tokens have 0."""
    shifted: np.ndarray = (scores - scores.max()) / np.float32(params.temperature)
    lowest = _largest(shifted, params.top_k) if 0 < params.top_k < len(shifted) else -math.inf
    if params.top_p < 1:
        lowest = _nucleus_edge(shifted if lowest == -math.inf else shifted[shifted >= lowest], params.top_p)
    if params.min_p > 0:
        lowest = max(lowest, math.log(params.min_p))
    if lowest == -math.inf:
        np.exp(shifted, out=shifted)
        return shifted
    kept = np.flatnonzero(shifted >= np.float32(lowest))
    weighed = np.zeros_like(shifted)
    weighed[kept] = np.exp(shifted[kept])
    return weighed


def _largest(values: np.ndarray, k: int) -> float:
    """Returns the k-th largest of ``values`` [V]."""
    maxima = np.maximum.reduceat(values, np.arange(0, len(values), _BLOCK))
    if k <= len(maxima):
        # At least k values reach the k-th largest block maximum. A few hundred are left to partition.
        values = values[values >= np.partition(maxima, -k)[-k]]
    return float(np.partition(values, -k)[-k])


def _nucleus_edge(shifted: np.ndarray, top_p: float) -> float:
    """Returns the smallest log weight in the nucleus: the fewest tokens that hold ``top_p`` of the mass (arXiv 1904.09751)."""
    weighed = np.exp(shifted)
    total = float(weighed.sum(dtype=np.float64))
    # A token below an equal share of the mass outside the nucleus can't be in it. So most of a vocabulary is never sorted.
    likely = np.sort(shifted[weighed >= total * (1 - top_p) / len(weighed)])[::-1]
    mass = np.cumsum(np.exp(likely), dtype=np.float64)
    edge = int(np.searchsorted(mass, top_p * total, side="left"))
    return float(likely[min(edge, len(likely) - 1)])


def draw(weights: np.ndarray, uniform: float) -> int:
    """Draws a token: the one at the share ``uniform`` ∈ [0, 1) of the cumulated weights [V]. Never draws a token of weight 0."""
    # Two levels: blocks, then the tokens of one block. Cumulating a whole vocabulary takes twenty times as long.
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    target = uniform * float(blocks[-1])
    block = _locate(blocks, target)
    start = block * _BLOCK
    tokens = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    return start + _locate(tokens, target - float(blocks[block - 1]) if block else target)


def _locate(cumulated: np.ndarray, target: float) -> int:
    """Returns the first index whose cumulated weight exceeds ``target``. If rounding left none: the last index with a weight."""
    index = int(cumulated.searchsorted(target, side="right"))
    return index if index < len(cumulated) else int(cumulated.searchsorted(cumulated[-1], side="left"))


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) for the token at ``position`` of a sequence. It depends on the seed and the position alone.

    It has 53 bits of BLAKE2b. Rows of a draft need no generator state, and rejected rows consume nothing.
    """
    import hashlib

    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
