"""Times one generation as an application sees it: from one chunk of the stream to the next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.sampling import SamplingParams
from ...runtime.session import Session
from ...runtime.tree import Tree

GREEDY = SamplingParams()
_CHOICE = ("rows_histogram", "plain_steps", "probes", "trust", "costs")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to draft: on a ``tree``, or with the best rows of each step (None); ``lookup`` adds what the text repeats.

    ``rows`` is their number; None takes as many as pay, in each step. ``params`` choose the tokens.
    """

    tree: Tree | None = None
    rows: int | None = None
    lookup: bool = False
    params: SamplingParams = GREEDY

    @property
    def options(self) -> dict[str, Any]:
        """The way as fields of a request."""
        return {"tree": self.tree, "rows": self.rows, "lookup": self.lookup, "params": self.params}


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """List the names from the ``turn``-th on, then those before it: each is first equally often."""
    found = list(names)
    start = turn % len(found)
    return found[start:] + found[:start]


@dataclass(slots=True)
class TimedRun:
    """Times and tokens of one run.

    ``step_seconds`` has every decode step, detokenising included; ``engine_seconds`` is the engine's share of their sum.
    ``tokens`` are all emitted tokens. The first comes from the prefill and counts in no rate of decoding. ``choice`` says how
    many rows the steps had, and why (fields of the session's ``Stats``).
    """

    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    engine_seconds: float = 0.0
    accepted: dict[int, int] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)

    @property
    def decoded(self) -> int:
        """Tokens that decode steps emitted."""
        return len(self.tokens) - 1

    @property
    def decode_seconds(self) -> float:
        """Wall time of all decode steps."""
        return sum(self.step_seconds)


def timed_run(session: Session, prompt: Sequence[int], way: Way, max_new_tokens: int) -> TimedRun:
    """Generate from token ids in this way, to the end-of-sequence token or ``max_new_tokens``."""
    run = TimedRun()
    executor = session.executor
    before = time.perf_counter()
    engine = 0.0
    chunks = session.stream(token_ids=prompt, max_new_tokens=max_new_tokens, **way.options)
    for index, chunk in enumerate(chunks):
        now = time.perf_counter()
        if chunk.finish_reason is not None:
            assert chunk.stats is not None
            run.accepted = dict(chunk.stats.accepted)
            run.choice = {name: getattr(chunk.stats, name) for name in _CHOICE}
            break
        run.tokens += chunk.token_ids
        if index:
            run.step_seconds.append(now - before)
        else:
            run.prefill_seconds = now - before
            engine = executor.engine_seconds
        before = now
    run.engine_seconds = executor.engine_seconds - engine
    return run
