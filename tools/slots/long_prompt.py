"""Times what a long prompt does to answers that stream while it is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, cycle, islice
from statistics import median
from typing import Any

from ...runtime.errors import CapacityError, UsageError
from ...runtime.request import Request
from ...runtime.session import Session
from ..console import table
from ..measure.timed_run import Way, in_turn
from .bench import Advance, check_users, slot_ways
from .report import chunks_after_first, gaps, title
from .users import Answer, read

_LEAD = 8  # chunks that every stream has got before the long prompt comes


@dataclass(frozen=True, slots=True)
class Arrival:
    """One long prompt among streams. ``window``: from its submission to its first token. ``alone``: that time without streams."""

    streams: list[Answer]
    window: tuple[float, float]
    alone: float


def long_prompt_bench(
    session: Session,
    prompts: Sequence[list[int]],
    tokens: int,
    *,
    streams: int = 4,
    fixed_rows: Sequence[int] = (),
    repeats: int = 3,
    progress: Advance = lambda _done, _note: None,
) -> dict[str, Any]:
    """Let a prompt of ``tokens`` tokens arrive while ``streams`` answers stream, ``repeats`` times in each way of the streams.

    The prompt is made of ``prompts``, another one each time. It comes when every stream has had some chunks, and the streams
    don't end before it has its first token. Gaps of the streams are as in :func:`.bench.slots_bench`, ``before`` it came and
    ``during`` its prefill. ``chunk_s`` is the prompt's time to the first token alone in the session, by its chunks.
    ``limit_s`` is ``chunk_s`` and two median gaps of before; ``met`` says whether the 99th percentile of ``during`` stays below.

    Raises:
        CapacityError: the prompt doesn't fit.
        UsageError: too few slots or prompts, or streams that end too early: the session's capacity is small.
    """
    check_users(session, streams, prompts)
    if streams >= session.slots.slots:
        raise UsageError(f"{streams} streams and a prompt, the session has {session.slots.slots} slots", hint="load more slots")
    if repeats < 1 or tokens < 2:
        raise UsageError(f"{repeats} repeats, {tokens} tokens", hint="at least 1 repeat and 2 tokens")
    limits = session.manifest.limits
    if tokens >= limits.capacity:
        raise CapacityError(
            f"a prompt of {tokens} tokens leaves no room for an answer: the capacity is {limits.capacity}",
            hint="take a shorter --long-prompt, or export with a larger --capacity",
        )
    ways = slot_ways(session, fixed_rows)
    text = [token for prompt in prompts for token in prompt]
    starts = count()  # no prompt begins as another did: nothing of it lies in a slot

    def long_prompt() -> Request:
        return Request(token_ids=list(islice(cycle(text), (start := next(starts)), start + tokens)), max_new_tokens=1)

    for way in ways.values():  # warms up
        _arrival(session, prompts[:streams], way, long_prompt(), 0.0)
    arrivals: dict[str, list[Arrival]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for place, name in enumerate(in_turn(ways, repeat)):
            progress(repeat * len(ways) + place, name)
            alone = read(session, 0, long_prompt()).first_token_seconds
            arrivals[name].append(_arrival(session, prompts[:streams], ways[name], long_prompt(), alone))
            progress(repeat * len(ways) + place + 1, name)
    chunks = -(-tokens // limits.prefill_chunk)
    sides = {name: _side(found, chunks) for name, found in arrivals.items()}
    return {"long_prompt": tokens, "prefill_chunk": limits.prefill_chunk, "streams": streams, "repeats": repeats, "ways": sides}


def _arrival(session: Session, prompts: Sequence[list[int]], way: Way, request: Request, alone: float) -> Arrival:
    """Start the streams, submit the request among them, and end them when it has its first token."""
    stop, ready = threading.Event(), threading.Semaphore(0)
    capacity = session.manifest.limits.capacity

    def seen(answer: Answer) -> None:
        if len(answer.sizes) == 1 + _LEAD:
            ready.release()

    def stream(index: int) -> Answer:
        longest: dict[str, Any] = {"max_new_tokens": capacity - len(prompts[index]), "ignore_eos": True, "cancel": stop.is_set}
        return read(session, index, Request(token_ids=prompts[index], **longest, **way.options), seen)

    with ThreadPoolExecutor(len(prompts)) as users:
        running = [users.submit(stream, index) for index in range(len(prompts))]
        try:
            for _ in running:
                while not ready.acquire(timeout=0.1):
                    _check_running(running)
            long = read(session, 0, request)
            _check_running(running)
        finally:
            stop.set()
        return Arrival([future.result() for future in running], (long.submitted, long.arrivals[0]), alone)


def _check_running(streams: Sequence[Future[Answer]]) -> None:
    """Refuse to go on without a stream. Raises its error where it failed."""
    for stream in streams:
        if stream.done():
            raise UsageError(
                f"a stream ended after {len(stream.result().tokens)} tokens, before the long prompt was read",
                hint="export with a larger --capacity, or take a shorter --long-prompt",
            )


def _side(arrivals: Sequence[Arrival], chunks: int) -> dict[str, Any]:
    before: list[tuple[float, int]] = []
    during: list[tuple[float, int]] = []
    for arrival in arrivals:
        came, read_at = arrival.window
        all_stream = max(answer.arrivals[0] for answer in arrival.streams)
        for at, gap, size in (chunk for answer in arrival.streams for chunk in chunks_after_first(answer)):
            if at > came and at - gap < read_at:
                during.append((gap, size))
            elif at <= came and at - gap >= all_stream:
                before.append((gap, size))
    calm, busy = gaps(before), gaps(during)
    chunk = median(arrival.alone for arrival in arrivals) / chunks
    limit = chunk + 2 * calm["chunk_gap_s"]["p50"]
    return {
        "before": calm,
        "during": busy | {"chunks": len(during), "longest_s": max(gap for gap, _ in during)},
        "first_token_s": median(came_to - came for came, came_to in (arrival.window for arrival in arrivals)),
        "alone_s": median(arrival.alone for arrival in arrivals),
        "chunk_s": chunk,
        "limit_s": limit,
        "met": busy["chunk_gap_s"]["p99"] <= limit,
    }


def describe_long_prompt(report: Mapping[str, Any]) -> str:
    """Write the report for a person, one line a way."""
    rows = []
    for name, side in report["ways"].items():
        calm, busy = side["before"], side["during"]
        shown = [calm["chunk_gap_s"]["p50"], calm["chunk_gap_s"]["p99"], busy["chunk_gap_s"]["p50"], busy["chunk_gap_s"]["p99"]]
        shown += [busy["longest_s"], busy["token_gap_s"]["p99"], side["limit_s"], side["first_token_s"], side["alone_s"]]
        rows.append([title(name), *(f"{1e3 * seconds:.1f}" for seconds in shown), "yes" if side["met"] else "no"])
    headers = ["ms", "gap before", "p99", "during", "p99", "longest", "by token p99", "limit", "first token", "alone", "within"]
    headline = f"{report['streams']} streams while a prompt of {report['long_prompt']} tokens is read, {report['repeats']} times"
    told = f"limit: one chunk of {report['prefill_chunk']} tokens and two gaps of before"
    return "\n".join([headline, "", table(rows, headers), "", told])
