"""Drives a real server as the world does: requests come when they come, whether earlier ones have ended or not."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

from ...runtime.request import Request
from ...runtime.session import Session
from .bench import Advance
from .http_client import Server, Stream
from .report import gaps, quantiles

_HEALTH_EVERY = 0.1


@dataclass(slots=True)
class Load:
    """What clients saw in some time. ``health``: the times of ``/health`` meanwhile."""

    streams: list[Stream] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """What a good answer keeps: seconds to its first token, and the mean seconds of each token after it."""

    first_token_s: float = 1.0
    token_gap_s: float = 0.1

    def kept(self, stream: Stream) -> bool:
        """Whether an answer that finished kept it."""
        after = stream.tokens - stream.sizes[0]
        mean = (stream.arrivals[-1] - stream.arrivals[0]) / after if after else 0.0
        return stream.first_token_seconds <= self.first_token_s and mean <= self.token_gap_s


async def arrivals(server: Server, bodies: Sequence[Mapping[str, Any]], rate: float, seconds: float, seed: int) -> Load:
    """Let requests arrive ``rate`` times a second on average, by a Poisson process, for ``seconds``; wait for their ends."""
    chance, load, tasks = random.Random(seed), Load(), list[asyncio.Task[Stream]]()  # noqa: S311 - no secret
    async with _health_watched(server, load):
        began = due = time.perf_counter()
        for number in count():
            due += chance.expovariate(rate)
            if due > began + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(server.stream(bodies[number % len(bodies)], due)))
        load.streams = list(await asyncio.gather(*tasks))
        load.seconds = max(seconds, time.perf_counter() - began)
    return load


async def users(server: Server, bodies: Sequence[Mapping[str, Any]], number: int, seconds: float) -> tuple[Load, list[int]]:
    """Let ``number`` clients ask again and again for ``seconds``. Returns also the tokens that each of them got by then."""
    load, tokens = Load(), [0] * number
    async with _health_watched(server, load):
        began = time.perf_counter()
        end = began + seconds

        async def user(index: int) -> None:
            for turn in count(index):
                stream = await server.stream(bodies[turn % len(bodies)])
                load.streams.append(stream)
                tokens[index] += sum(size for came, size in zip(stream.arrivals, stream.sizes, strict=True) if came <= end)
                if time.perf_counter() >= end:
                    break

        await asyncio.gather(*(user(index) for index in range(number)))
        load.seconds = time.perf_counter() - began
    return load, tokens


@asynccontextmanager
async def _health_watched(server: Server, load: Load) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            load.health.append(await server.health_seconds())
            await asyncio.sleep(_HEALTH_EVERY)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def summary(load: Load, target: Target) -> dict[str, Any]:
    """Figures of a load. ``goodput_per_s``: answers a second that kept the ``target``; ``goodput_share``: of all that came."""
    done = [stream for stream in load.streams if stream.finished and stream.arrivals]
    kept = sum(map(target.kept, done))
    refused = sum(stream.status in (429, 503) for stream in load.streams)
    found: dict[str, Any] = {
        "requests": len(load.streams),
        "finished": len(done),
        "refused": refused,
        "failed": len(load.streams) - len(done) - refused,
        "seconds": load.seconds,
        "tokens_per_s": sum(stream.tokens for stream in done) / load.seconds,
        "goodput_per_s": kept / load.seconds,
        "goodput_share": kept / max(1, len(load.streams)),
        "slowest_health_s": max(load.health, default=0.0),
    }
    pieces = [
        (after - before, size)
        for stream in done
        for before, after, size in zip(stream.arrivals, stream.arrivals[1:], stream.sizes[1:], strict=False)
    ]
    queued = [stream.queue_seconds for stream in done if stream.queue_seconds is not None]
    found["first_token_s"] = quantiles(stream.first_token_seconds for stream in done) if done else None
    found["token_gap_s"] = gaps(pieces)["token_gap_s"] if pieces else None
    found["queue_s"] = quantiles(queued) if queued else None
    return found


def http_cost(
    session: Session, server: Server, bodies: Sequence[Mapping[str, Any]], repeats: int, progress: Advance
) -> dict[str, Any]:
    """Compare a token over HTTP with one of ``session`` in this process: one stream, the same prompts, in turns.

    ``added_s`` is the difference of the median gaps between tokens.
    """
    here: list[float] = []
    there: list[float] = []
    for repeat in range(repeats):
        for index, body in enumerate(bodies):
            progress(repeat * len(bodies) + index, "one stream")
            for side in ("here", "there") if (repeat + index) % 2 else ("there", "here"):
                if side == "there":
                    stream = asyncio.run(server.stream(body))
                    times, sizes = stream.arrivals, stream.sizes
                else:
                    times, sizes = _read_here(session, body)
                found = here if side == "here" else there
                for before, after, size in zip(times, times[1:], sizes[1:], strict=False):
                    found += [(after - before) / size] * size
    if not here or not there:
        return {"in_process_s": math.nan, "http_s": math.nan, "added_s": math.nan}
    return {"in_process_s": median(here), "http_s": median(there), "added_s": median(there) - median(here)}


def _read_here(session: Session, body: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    times, sizes = [], []
    handle = session.submit(Request(token_ids=list(body["prompt"]), max_new_tokens=body["max_tokens"], ignore_eos=True))
    for chunk in handle.chunks():
        if chunk.token_ids:
            times.append(time.perf_counter())
            sizes.append(len(chunk.token_ids))
    return times, sizes
