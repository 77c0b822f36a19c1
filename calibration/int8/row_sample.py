"""Samples a bounded number of rows of activations. The search for smoothing factors tries its matmuls on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...runtime.files.scales_file import Smoothing
from .collect import Calibrator, Progress
from .matmuls import StepGraph
from .observations import Observations
from .smoothing import choose_smoothing
from .takers import Smoothable, smoothable

SAMPLED_PROMPTS = 16
_FEWEST_PROMPTS = 4
_OF_PROMPT = 8  # rows, the first one among them: it holds the massive activations
_OF_STEPS = 8  # roots of the first steps
_MOST_BYTES = 1 << 30


class RowSample:
    """Samples one prompt: its first row, 7 others that are evenly spread over it, and the root rows of the first 8 steps."""

    def __init__(self, names: Iterable[str], prompt_length: int) -> None:
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._positions = {round(at) for at in np.linspace(0, prompt_length - 1, _OF_PROMPT)}
        self._steps = 0

    def take(self, values: Iterable[tuple[str, np.ndarray]], positions: np.ndarray, *, prefill: bool) -> None:
        """Keep the sampled rows of a call's activations [1, N, C]."""
        chosen = [row for row, at in enumerate(positions.tolist()) if at in self._positions] if prefill else [0]
        if not prefill:
            self._steps += 1
            if self._steps > _OF_STEPS:
                return
        for name, value in values:
            if name in self.rows and chosen:
                self.rows[name].append(value.reshape(-1, value.shape[-1])[chosen].astype(np.float32))


def sample_rows(
    calibrator: Calibrator, names: Sequence[str], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> dict[str, np.ndarray]:
    """Sample rows float32 [R, C] of the activations ``names`` from the first prompts and their answers. R is at most 256.

    Every call samples the same rows. If the rows would pass 1 GiB, fewer prompts are taken, 4 at least.
    """
    channels = {matmul.activation: matmul.channels for matmul in calibrator.matmuls}
    of_prompt = 4 * (_OF_PROMPT + _OF_STEPS) * sum(channels[name] for name in names)
    count = max(_FEWEST_PROMPTS, min(SAMPLED_PROMPTS, _MOST_BYTES // max(of_prompt, 1)))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for prompt in prompts[:count]:
        sample = RowSample(names, len(prompt))
        calibrator.watch(prompt, min(max_new_tokens, 4 * _OF_STEPS), sample)
        for name, found in sample.rows.items():
            rows[name] += found
    return {name: np.concatenate(found) for name, found in rows.items()}


def smooth_activation(
    graph: StepGraph,
    activation: Smoothable,
    rows: np.ndarray,
    maxima: np.ndarray,
    alphas: Sequence[float | None],
) -> dict[str, Smoothing]:
    """Find the best smoothing of one activation for each grid, by its ``rows`` [R, C] and the largest magnitudes [C]."""

    def weights() -> Iterator[np.ndarray]:
        return (block for key in activation.readers for block in graph.weight_blocks(*key))

    return choose_smoothing(rows, maxima, weights, alphas, activation.heads)


def find_smoothing(
    calibrator: Calibrator,
    seen: Observations,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    alphas: Sequence[float | None],
    progress: Progress = lambda _done, _note: None,
) -> Mapping[str, Mapping[str, Smoothing]]:
    """Find the smoothing of every activation that can be smoothed for free, by grid. ``seen`` has their ranges."""
    graph = calibrator.graph
    found = smoothable(graph) if alphas else {}
    rows = sample_rows(calibrator, list(found), prompts, max_new_tokens) if found else {}
    result = {}
    for done, (name, activation) in enumerate(found.items(), 1):
        result[name] = smooth_activation(graph, activation, rows.pop(name), seen.observers[name].channel_maxima, alphas)
        progress(done, f"of {len(found)} activations")
    return result
