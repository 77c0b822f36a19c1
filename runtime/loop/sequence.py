"""One generation in flight: its tokens, its newest candidates, and what the next step must commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..drafting.draft import NOTHING, Candidates, Draft, Drafter
from ..sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(slots=True)
class Stats:
    """What a generation cost. ``accepted[a]``: decode steps that accepted ``a`` drafted tokens.

    ``rows_histogram[n]``: decode steps that verified n rows. ``plain_steps``: those of one row in which no heads ran; ``probes``:
    those that ran the heads only to see whether drafting pays again. ``lookup_steps``: those whose rows were chosen from what the
    text repeats, too.

    Where the number of rows was left open, ``trust`` is what the chances by each head, and by lookup, were multiplied by, and
    ``costs`` what a step costs by its rows, and the heads, against a plain one (:mod:`.row_budget`): at the end, or up to 16
    steps before it where a stop string or the caller ended the generation.
    """

    prompt_tokens: int = 0
    steps: int = 0
    emitted: int = 0
    rows: int = 0
    rows_histogram: dict[int, int] = field(default_factory=dict)
    plain_steps: int = 0
    probes: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    lookup_steps: int = 0
    trust: list[float] | None = None
    costs: dict[str, float] | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    engine_seconds: float = 0.0

    def add_step(self, draft: Draft, accepted: int, emitted: int, *, heads: bool) -> None:
        """Count one decode step that kept ``emitted`` tokens. ``heads``: whether they ran for this sequence."""
        rows = draft.shape.rows
        self.steps += 1
        self.rows += rows
        self.rows_histogram[rows] = self.rows_histogram.get(rows, 0) + 1
        self.plain_steps += rows == 1 and not heads
        self.lookup_steps += draft.looked_up
        self.emitted += emitted
        self.accepted[accepted] = self.accepted.get(accepted, 0) + 1

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted drafted tokens per decode step."""
        total = sum(accepted * steps for accepted, steps in self.accepted.items())
        return 1.0 + total / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, the prefill excluded."""
        return self.emitted / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def host_fraction(self) -> float:
        """Share of the decoding time spent outside the engine."""
        return 1.0 - self.engine_seconds / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(slots=True)
class Sequence:
    """Tokens of one request. ``tokens`` is the only truth of what was emitted; the newest one is the next step's root.

    ``candidates``: what the heads proposed at the row of the root. ``draft``: the rows that the newest step verifies; a prefill's
    last row stands alone, as a root does. ``hidden``: the backbone's states [H] behind the emitted tokens, when they were asked
    for; the last step may have added more than were emitted.
    """

    slot: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    drafter: Drafter
    keep_hidden: bool = False
    candidates: Candidates | None = None
    draft: Draft = NOTHING
    hidden: list[np.ndarray] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def root(self) -> int:
        """The newest emitted token; its own row isn't in the cache yet."""
        return self.tokens[-1]

    @property
    def emitted(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def emit(self, tokens: list[int]) -> list[int]:
        """Append what fits: up to an end-of-sequence token or the length limit. Returns the tokens kept."""
        kept = tokens[: self.remaining]
        for index, token in enumerate(kept):
            if token in self.eos_token_ids:
                kept = kept[: index + 1]
                self.finish_reason = "stop"
                break
        self.tokens.extend(kept)
        if self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        return kept
