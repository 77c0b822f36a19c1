"""Estimates how long a training takes: answers by those that are done, training by steps that were timed before."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..console import human_seconds

if TYPE_CHECKING:
    from ...calibration.training.train import TrainConfig

_STEPS = 4


class TimeEstimate:
    """Says what answering and training will take.

    ``step``: seconds of a training step. ``heldout``: held-out prompts, which are answered behind the training prompts.
    ``together``: prompts that are answered at a time. Before so many answers are there, their time says nothing.
    """

    def __init__(self, config: TrainConfig, step: float, heldout: int, together: int) -> None:
        self._config, self._step, self._heldout, self._together = config, step, heldout, together
        self._first: tuple[int, float] | None = None
        self._said = False

    def training(self, tokens: float) -> float:
        """Return the seconds of training on so many tokens."""
        return self._config.epochs * max(1, tokens // self._config.batch_size) * self._step

    def first_words(self, done: int, total: int, tokens: int) -> str:
        """Return a line on the whole run when the first answers are there, once; else an empty one.

        The first call says what an earlier run answered.
        """
        now = time.monotonic()
        first, since = self._first = self._first or (done, now)
        if self._said or tokens <= 0 or done - first < max(1, min(self._together, total - first)):
            return ""
        self._said = True
        answers = (now - since) / (done - first) * (total - first + self._heldout)
        training = self.training(tokens * total / done)
        return (
            f"estimate: {human_seconds(answers + training)} in all: answers {human_seconds(answers)}, "
            f"training {human_seconds(training)}"
        )

    def note(self, done: int, total: int, tokens: int) -> str:
        """Describe the state of answering: its tokens, and the training that they will take."""
        after = f", then training {human_seconds(self.training(tokens * total / done))}" if done else ""
        return f"{tokens:,} tokens{after}"


def time_steps(config: TrainConfig, hidden_size: int, device: str) -> float:
    """Time a training step of the heads of ``config`` on random states, in seconds."""
    import torch

    from ...calibration.training.examples import Examples
    from ...calibration.training.train import train_heads

    vocabulary = config.draft_vocab_size
    weights = torch.randn(vocabulary, hidden_size)

    def run(steps: int) -> float:
        count = steps * config.batch_size
        roots = torch.arange(max(count, vocabulary)) % vocabulary  # the draft vocabulary is made of them
        labels = torch.randint(vocabulary, (count, config.num_heads))
        examples = Examples(torch.randn(count, hidden_size).half(), roots, labels)
        started = time.perf_counter()
        train_heads(examples, weights, weights, replace(config, epochs=1), device=device)
        return time.perf_counter() - started

    run(1)  # warms up
    short = run(1)
    return max((run(1 + _STEPS) - short) / _STEPS, 1e-6)
