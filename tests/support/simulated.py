"""A simulated engine: text and step times are made up, so that what is chosen can be held against what would have been best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medusa_deploy.runtime.drafting.draft import Candidates
from medusa_deploy.runtime.drafting.row_budget import RowBudget
from medusa_deploy.runtime.loop.sequence import Sequence
from medusa_deploy.runtime.sampling import SamplingParams

HEADS, TOP_K = 4, 10


def heads(says: float, right: float) -> Callable[[np.random.Generator, list[int]], Candidates]:
    """Heads whose best candidate has the probability ``says`` and is right in a share ``right`` of the positions."""

    def propose(rng: np.random.Generator, coming: list[int]) -> Candidates:
        tokens = np.array([10_000 + 100 * head + np.arange(TOP_K) for head in range(HEADS)])
        for head, token in enumerate(coming[:HEADS]):
            if rng.random() < right:
                tokens[head, 0] = token
        rest = (1 - says) / (2 * TOP_K)
        log_probs = np.log(np.tile([says, *[rest] * (TOP_K - 1)], (HEADS, 1))).astype(np.float32)
        return Candidates(tokens, log_probs)

    return propose


class Simulation:
    """One session; ``run`` decodes one request on it and returns its time in plain steps, against one plain step a token."""

    def __init__(
        self, cost: Callable[[int], float], *, of_heads: float = 0.05, sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 16),
        measured: bool = False, noise: float = 0.03, seed: int = 0,
    ) -> None:  # fmt: skip
        scaling = ((1.0, 0.0),) * HEADS if measured else ()
        self.row_budget = RowBudget(sizes, HEADS, scaling)
        self.rng = np.random.default_rng(seed)
        self._cost, self._of_heads, self._noise = cost, of_heads, noise
        self.sequence: Sequence

    def run(self, propose: Callable[[np.random.Generator, list[int]], Candidates], tokens: int = 128) -> float:
        """Speed-up over plain decoding, with the same noise in the step times."""
        text = self.rng.integers(0, 5000, tokens + HEADS + 1).tolist()
        drafter = self.row_budget.drafter(None, on_host=False)
        self.sequence = sequence = Sequence([0], 0, SamplingParams(), tokens + 1, frozenset(), drafter)
        sequence.candidates = propose(self.rng, text) if drafter.heads else None
        taken = 0.0
        while (done := len(sequence.tokens) - 1) < tokens:
            self.row_budget.choose([sequence])
            draft = sequence.draft = drafter.draft(sequence.candidates)
            assert draft.shape.rows <= drafter.rows
            path: list[int] = []
            for row, rows in enumerate(draft.shape.row_paths):
                guess = [int(draft.tokens[at - 1]) for at in rows]
                if row and guess == text[done : done + len(rows)] and len(rows) > len(path):
                    path = list(rows)
            emitted = text[done : done + len(path) + 1]
            seconds = self._cost(draft.shape.rows) + self._of_heads * drafter.heads
            taken += seconds
            seconds *= 0.03 * np.exp(self._noise * self.rng.normal())
            after = text[done + len(emitted) :]
            sequence.candidates = propose(self.rng, after) if drafter.heads else None
            stats, rows = sequence.stats, draft.shape.rows
            stats.add_step(rows, len(path), len(emitted), heads=drafter.heads, looked_up=draft.looked_up)
            self.row_budget.learn([sequence], [emitted], [seconds])
            sequence.tokens += emitted[: tokens - done]
        return tokens / taken



class PackedSimulation:
    """Requests that share packed steps; ``run`` decodes them to the end and returns the speed-up over plain packed steps."""

    def __init__(self, cost: Callable[[int], float], *, of_heads: float = 0.05, noise: float = 0.03, seed: int = 0) -> None:
        """``cost``: time of a step by the rows of all sequences."""
        self.row_budget = RowBudget((1, 2, 3, 4, 5, 6, 8, 12, 16), HEADS, ((1.0, 0.0),) * HEADS, packed=True)
        self.rng = np.random.default_rng(seed)
        self.rows: list[list[int]] = []
        """Rows of each sequence, step by step."""
        self._cost, self._of_heads, self._noise = cost, of_heads, noise

    def run(self, proposals: list[Callable[[np.random.Generator, list[int]], Candidates]], tokens: int = 128) -> float:
        texts = [self.rng.integers(0, 5000, tokens + HEADS + 1).tolist() for _ in proposals]
        sequences = []
        for _ in proposals:
            drafter = self.row_budget.drafter(None, on_host=False)
            sequences.append(Sequence([0], 0, SamplingParams(), tokens + 1, frozenset(), drafter))
        taken = plain = 0.0
        self.rows = []
        while going_on := [index for index, sequence in enumerate(sequences) if len(sequence.tokens) <= tokens]:
            active = [sequences[index] for index in going_on]
            self.row_budget.choose(active)
            emitted = []
            for index, sequence in zip(going_on, active, strict=True):
                done = len(sequence.tokens) - 1
                draft = sequence.draft = sequence.drafter.draft(sequence.candidates)
                path: list[int] = []
                for row, rows in enumerate(draft.shape.row_paths):
                    guess = [int(draft.tokens[at - 1]) for at in rows]
                    if row and guess == texts[index][done : done + len(rows)] and len(rows) > len(path):
                        path = list(rows)
                emitted.append(texts[index][done : done + len(path) + 1][: tokens + 1 - len(sequence.tokens)])
                after = texts[index][done + len(emitted[-1]) :]
                sequence.candidates = proposals[index](self.rng, after) if sequence.drafter.heads else None
                counts = (draft.shape.rows, len(path), len(emitted[-1]))
                sequence.stats.add_step(*counts, heads=sequence.drafter.heads, looked_up=False)
            self.rows.append([sequence.draft.shape.rows for sequence in active])
            seconds = self._cost(sum(self.rows[-1])) + self._of_heads * any(sequence.drafter.heads for sequence in active)
            taken += seconds
            plain += self._cost(len(active)) * sum(len(each) for each in emitted) / len(active)
            seconds *= 0.03 * np.exp(self._noise * self.rng.normal())
            self.row_budget.learn(active, emitted, [seconds] * len(active))
            for sequence, new in zip(active, emitted, strict=True):
                sequence.tokens += new
        return plain / taken
