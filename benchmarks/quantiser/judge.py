"""Judges what quantising does to next-token distributions: by the same texts and reference, whatever computes them.

Needs numpy and this repository's ``src`` on the path: the worker in another library's environment judges by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.calibration.distributions import kl_divergence, log_softmax

TEXTS, REFERENCE = "texts.json", "reference.npy"
Logits = Callable[[list[int], list[int]], np.ndarray]
"""Maps a prompt and an answer of n tokens to the logits [n, V] that the answer's tokens are chosen by."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Holds ``calibration`` and ``texts`` (prompts and answers, token ids) and log-probabilities ``reference`` float32 [n, V]."""

    calibration: list[tuple[list[int], list[int]]]
    texts: list[tuple[list[int], list[int]]]
    reference: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Judge:
        """Read what :meth:`write` has written."""
        found = json.loads((folder / TEXTS).read_text("utf-8"))
        pairs = {name: [(prompt, answer) for prompt, answer in found[name]] for name in ("calibration", "texts")}
        return cls(**pairs, reference=np.load(folder / REFERENCE, mmap_mode="r"))

    @classmethod
    def write(
        cls,
        folder: Path,
        calibration: list[tuple[list[int], list[int]]],
        texts: list[tuple[list[int], list[int]]],
        logits: Logits,
    ) -> Judge:
        """Write the texts and the reference's predictions in them."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / REFERENCE, np.concatenate([log_softmax(logits(*text)).astype(np.float32) for text in texts]))
        (folder / TEXTS).write_text(json.dumps({"calibration": calibration, "texts": texts}), "utf-8")
        return cls.read(folder)

    def of(self, logits: Logits) -> dict[str, Any]:
        """Measure perplexity against the reference, mean KL(reference‖other) in nats, and the share of equal argmaxes.

        ``kl_error``: the standard error of the mean, texts taken as independent.
        """
        nll, same, kl, at = 0.0, 0, [], 0
        for prompt, answer in self.texts:
            expected = self.reference[at : at + len(answer)]
            found = log_softmax(logits(prompt, answer)).astype(np.float32)
            rows = np.arange(len(answer))
            nll += float((expected[rows, answer] - found[rows, answer]).sum())
            kl.append(float(kl_divergence(expected, found).sum()))
            same += int((expected.argmax(1) == found.argmax(1)).sum())
            at += len(answer)
        return {
            "positions": at,
            "perplexity_increase_percent": 100 * (float(np.exp(nll / at)) - 1),
            "kl_nats": sum(kl) / at,
            "kl_error": float(np.std(kl) * len(kl) ** 0.5 / at),
            "argmax_agreement": same / at,
        }
