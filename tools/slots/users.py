"""Users of a session: each is a thread that asks, and reads its answer chunk by chunk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ...runtime.request import Request, Stats
from ...runtime.session import Session


@dataclass(slots=True)
class Answer:
    """One answer as its user saw it. ``arrivals``: when each chunk came; ``sizes``: its tokens. Times are of ``perf_counter``."""

    prompt: int
    submitted: float
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    @property
    def first_token_seconds(self) -> float:
        """Time from asking to the first chunk."""
        return self.arrivals[0] - self.submitted

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first chunk by the time that they took; None where there are none."""
        streamed = len(self.tokens) - self.sizes[0]
        return streamed / (self.arrivals[-1] - self.arrivals[0]) if streamed else None


@dataclass(frozen=True, slots=True)
class Block:
    """Answers to all prompts, so many at a time. ``seconds``: from the first question to the last chunk."""

    answers: list[Answer]
    seconds: float
    engine_seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers by the time of the block, prefills included."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def steady_tokens_per_s(self) -> float:
        """The same until the first user has nothing left to ask: so long all of them are served."""
        began = min(answer.submitted for answer in self.answers)
        asked_last = max(answer.submitted for answer in self.answers)
        until = min(end for answer in self.answers if (end := answer.arrivals[-1]) > asked_last)
        pairs = ((came, size) for answer in self.answers for came, size in zip(answer.arrivals, answer.sizes, strict=True))
        return sum(size for came, size in pairs if came <= until) / (until - began)


def read(session: Session, prompt: int, request: Request, seen: Callable[[Answer], object] = lambda _answer: None) -> Answer:
    """Ask, and read the answer to its end. ``seen`` is called after each chunk.

    Raises:
        DeployError: the request is refused, or its generation failed.
    """
    answer = Answer(prompt, time.perf_counter())
    handle = session.submit(request)
    try:
        for chunk in handle.chunks():
            if chunk.token_ids:
                answer.arrivals.append(time.perf_counter())
                answer.tokens += chunk.token_ids
                answer.sizes.append(len(chunk.token_ids))
                seen(answer)
            if chunk.stats is not None:
                answer.stats = chunk.stats
    finally:
        handle.cancel()
    return answer


def serve(session: Session, requests: Sequence[Request], slots: int) -> Block:
    """Answer all requests, ``slots`` at a time: so many users, each of whom asks again as soon as an answer has ended.

    Raises:
        DeployError: a request is refused or failed; the others are cancelled.
    """
    stop = threading.Event()
    engine = session.executor.engine_seconds

    def ask(index: int) -> Answer:
        try:
            return read(session, index, replace(requests[index], cancel=stop.is_set))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(slots) as users:
        try:
            answers = list(users.map(ask, range(len(requests))))
        finally:
            stop.set()  # where this thread was interrupted, the users' answers end, too
    seconds = max(answer.arrivals[-1] for answer in answers) - min(answer.submitted for answer in answers)
    return Block(answers, seconds, session.executor.engine_seconds - engine)
