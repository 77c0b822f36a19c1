"""What is asked of a session and what it answers: requests, stream chunks, finished generations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .drafting.draft import Drafter
from .loop.sequence import FinishReason, Sequence, Stats
from .sampling import SamplingParams
from .text.stops import StopChecker
from .tree import Tree

if TYPE_CHECKING:
    from .text.tokenizer import StreamDecoder

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to generate from: exactly one of ``prompt``, ``messages`` and ``token_ids``.

    ``tree``: the same rows in every step; ``ROOT_ONLY`` decodes plainly. Without one, each step verifies the ``rows`` that
    promise most (:class:`.draft.BestRows`); None: as many as pay, in each step (:mod:`.row_budget`), except that the mode
    typical, whose text depends on what is drafted, takes as many as the bundle's tree has. ``lookup``: whether what the text
    repeats is among them (:mod:`.lookup`); None: where the host drafts. Executors that run ahead of the host take the bundle's
    tree where neither ``rows`` nor ``lookup`` asks the host to draft. ``drafter`` drafts instead of all these. ``cancel`` is
    asked before every step.
    ``keep_hidden`` collects the backbone's hidden state behind every emitted token.
    """

    prompt: str | None = None
    messages: SequenceOf[Message] | None = None
    token_ids: SequenceOf[int] | None = None
    max_new_tokens: int = 128
    params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    tree: Tree | None = None
    rows: int | None = None
    lookup: bool | None = None
    drafter: Drafter | None = None
    cancel: Callable[[], bool] | None = None
    keep_hidden: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step of a stream adds; the last one carries the finish reason."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation. ``token_ids`` are all emitted tokens, an end-of-sequence token included."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    stats: Stats
    hidden: np.ndarray | None = None


class Run:
    """Turns the tokens of one sequence into text, stop strings applied."""

    def __init__(
        self, sequence: Sequence, decoder: StreamDecoder | None, stops: StopChecker, cancel: Callable[[], bool] | None
    ) -> None:
        self.sequence = sequence
        self._decoder = decoder
        self._stops = stops
        self._cancel = cancel
        self._text: list[str] = []

    def goes_on(self) -> bool:
        """Whether there is another step to do; asks ``cancel``."""
        sequence = self.sequence
        if sequence.finish_reason is None and self._cancel is not None and self._cancel():
            sequence.finish_reason = "cancelled"
        return sequence.finish_reason is None

    def take(self, tokens: list[int]) -> Chunk:
        """Text of newly emitted tokens, as far as it is certain."""
        text = "" if self._decoder is None else self._decoder.push([t for t in tokens if t not in self.sequence.eos_token_ids])
        text = self._stops.push(text)
        if self._stops.stopped and self.sequence.finish_reason in (None, "length"):
            self.sequence.finish_reason = "stop"
        self._text.append(text)
        return Chunk(text, tokens)

    def last_chunk(self) -> Chunk:
        """What was held back, with the finish reason and the statistics."""
        text = self._rest()
        self._text.append(text)
        return Chunk(text, [], self.sequence.finish_reason, self.sequence.stats)

    def _rest(self) -> str:
        tail = "" if self._decoder is None else self._decoder.flush()
        return str(self._stops.push(tail) + self._stops.flush())

    def generation(self) -> Generation:
        """The finished generation."""
        sequence = self.sequence
        assert sequence.finish_reason is not None
        text = "".join(self._text) + self._rest()
        hidden = np.stack(sequence.hidden[: len(sequence.emitted)]) if sequence.keep_hidden else None
        prompt = sequence.tokens[: sequence.prompt_length]
        return Generation(text, sequence.emitted, sequence.finish_reason, prompt, sequence.stats, hidden)
