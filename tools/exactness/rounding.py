"""Judges whether rounding made two runs choose different tokens: by measured noise, not by assumption.

The same position is computed in several ways: row by row, as one prefill, in a step of the tree's rows. Their largest difference
is the *noise* of that position. Rounding explains a divergence when

    gap ≤ REACH · noise  and  noise ≤ limit

The first says that both tokens are within reach of the noise. The second says that the noise is as small as rounding in the
bundle's dtype can be: a graph that is wrong in one of the ways is no excuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.sampling import SamplingParams, scores, uniform, weights
from ...runtime.session import Session
from ..environment import rounds_activations

TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "int8": 1e-1}
"""Largest noise that rounding may cause, as a share of the largest logit (of the whole mass, for a draw).

``int8`` is for graphs whose products round their inputs to 8 bits. The last bit of an attention's sum depends on the number of
rows. Now and then it decides which of two codes a value gets: a difference of 1e-7 becomes one of 1e-2 of the value, and so on.
"""

REACH = 2.0
"""A gap between two values can close when each of them moves by the noise."""


def tolerance_of(session: Session) -> float:
    """Tolerance for the graph that a session runs."""
    return TOLERANCE["int8" if rounds_activations(session) else session.manifest.dtype]


@dataclass(frozen=True, slots=True)
class Evidence:
    """``gap``: how far the values were from choosing the other token. ``noise``: how far they differ between computations.

    Values are logits for greedy decoding, and shares of the probability mass for a draw. ``limit`` is the largest noise that
    counts as rounding.
    """

    gap: float
    noise: float
    limit: float

    @property
    def explained(self) -> bool:
        """Tell whether rounding can have made the difference. NaN and infinities explain nothing."""
        return math.isfinite(self.noise) and self.gap <= REACH * self.noise and self.noise <= self.limit


def judge_argmax(computed: Sequence[np.ndarray], tokens: tuple[int, int], tolerance: float) -> Evidence:
    """Gather evidence that two tokens are both the argmax within the noise.

    ``computed``: logits [V] of one position, computed in two or more ways; the first is the run to be explained.
    """
    first, *others = computed
    noise = float(np.max([np.abs(first - other).max() for other in others]))
    scale = float(np.maximum(1.0, np.abs(first).max()))
    gap = float(first.max() - min(first[token] for token in tokens))
    return Evidence(gap, noise, tolerance * scale)


def judge_draw(
    computed: Sequence[np.ndarray],
    tokens: tuple[int, int],
    tolerance: float,
    params: SamplingParams,
    context: Sequence[int],
    prompt_length: int,
) -> Evidence:
    """Gather evidence that the uniform number of one position lies at a border between two tokens within the noise.

    Both runs draw with the same number, so they differ only when the cumulated probabilities moved across it. ``context`` are the
    tokens before the position.
    """
    assert params.seed is not None
    point = uniform(params.seed, len(context))
    first, *others = (_cumulated(params, logits, context, prompt_length) for logits in computed)
    noise = float(np.max([np.abs(first - other).max() for other in others]))
    gap = max(_distance(first, token, point) for token in tokens)
    return Evidence(gap, noise, tolerance)


def _cumulated(params: SamplingParams, logits: np.ndarray, context: Sequence[int], prompt_length: int) -> np.ndarray:
    """Cumulated probabilities [V], in the order of token ids."""
    mass = np.cumsum(weights(params, scores(params, logits, context, prompt_length)), dtype=np.float64)
    shares: np.ndarray = mass / mass[-1]
    return shares


def _distance(cumulated: np.ndarray, token: int, point: float) -> float:
    """Distance of ``point`` from the interval of ``token``; 0 inside it."""
    low = float(cumulated[token - 1]) if token else 0.0
    return max(0.0, low - point, point - float(cumulated[token]))
