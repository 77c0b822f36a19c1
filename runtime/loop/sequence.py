"""One request in flight: its tokens, its state, and the newest candidates for its next step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..drafting.draft import NOTHING, Candidates, Draft, Drafter
from ..grammar import Matcher
from ..request import FinishReason, Stats, TokenLogprob
from ..sampling import SamplingParams

State = Literal["waiting", "prefill", "decode", "done"]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request. ``tokens`` is the only truth of what was emitted; the newest one is the next step's root.

    ``salt``: its prompt may begin with rows of sequences of the same salt. ``slot``: given by the slot pool; -1 before.
    ``computed``: prompt tokens whose rows are in the cache. ``candidates``: the heads' at the row of the root.
    ``accepted_state``: hidden state [H] of the row that the host accepted last, which the heads have yet to see. ``draft``: the
    rows that the newest step verifies. ``hidden``: the backbone's states [H] behind the emitted tokens, where they were asked
    for; the last step may have added more than were emitted. ``cancelled``: set by other threads. ``deadline``, ``since`` (its
    submission): by the monotonic clock. ``top_logprobs``: the alternatives wanted at each emitted token; None wants no
    log-probabilities. ``matcher``: stands in its grammar behind the emitted tokens.
    """

    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    drafter: Drafter
    keep_hidden: bool = False
    salt: str = ""
    top_logprobs: int | None = None
    matcher: Matcher | None = None
    priority: int = 0
    deadline: float | None = None
    since: float = field(default_factory=time.monotonic)
    cancel: Callable[[], bool] | None = None
    slot: int = -1
    computed: int = 0
    candidates: Candidates | None = None
    accepted_state: np.ndarray | None = None
    draft: Draft = NOTHING
    hidden: list[np.ndarray] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    error: Exception | None = None
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

    @property
    def on_host(self) -> bool:
        """Whether the host chooses its tokens from logits, or reads them; the graph chooses otherwise."""
        return not self.params.plain_argmax or self.top_logprobs is not None or self.matcher is not None

    @property
    def done(self) -> bool:
        """Whether no further step is needed."""
        return self.finish_reason is not None

    @property
    def state(self) -> State:
        """Waiting → prefill → decode → done. A slot is held in prefill and decode."""
        if self.done:
            return "done"
        if self.slot < 0:
            return "waiting"
        return "prefill" if self.computed < self.prompt_length else "decode"

    def asks_to_end(self) -> bool:
        """Whether it is cancelled or late; asks the request's own ``cancel`` once its prompt is under way."""
        if self.cancelled or (self.deadline is not None and time.monotonic() >= self.deadline):
            return True
        return self.cancel is not None and self.computed > 0 and self.cancel()

    def ends_with(self, tokens: list[int]) -> bool:
        """Whether it ends within ``tokens`` that are emitted next."""
        return len(tokens) >= self.remaining or not self.eos_token_ids.isdisjoint(tokens)

    def emit(self, tokens: list[int]) -> list[int]:
        """Append as many as fit: up to an end-of-sequence token or the length limit. Returns the tokens kept."""
        kept = tokens[: self.remaining]
        for index, token in enumerate(kept):
            if token in self.eos_token_ids:
                kept = kept[: index + 1]
                self.finish_reason = "stop"
                break
        self.tokens.extend(kept)
        if self.matcher is not None and kept:
            self._follow(self.matcher, kept)
        if self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = "length"
        return kept

    def _follow(self, matcher: Matcher, tokens: list[int]) -> None:
        """Take emitted tokens through the grammar. The sequence ends where nothing can follow."""
        try:
            matcher.advance(tokens)
            if self.finish_reason is None and matcher.finished():
                self.finish_reason = "stop"
        except Exception as error:  # noqa: BLE001 - a grammar's failure ends its own request
            self.fail(error)

    def cut(self, count: int) -> None:
        """Take back the last ``count`` tokens: a stop string was complete before them, so plain decoding never emits them."""
        del self.tokens[-count:]
        if self.logprobs is not None:
            del self.logprobs[len(self.tokens) - self.prompt_length :]
        self.stats.emitted -= count
        self.finish_reason = self.finish_reason if self.finish_reason == "error" else "stop"

    def fail(self, error: Exception) -> None:
        """End with ``error``; what was emitted stays."""
        self.finish_reason, self.error = "error", error
