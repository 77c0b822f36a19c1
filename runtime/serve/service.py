"""The engine side of the server: the session once it is loaded, admission, and the state of health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..async_session import AsyncSession
from ..errors import CapacityError, GrammarError, QueueFullError
from ..grammar import Grammar
from ..request import Chunk, Request, Stats
from .errors import ApiError, api_error, not_ready, shutting_down
from .fields import Fields
from .metrics import Metrics
from .spans import Spans

if TYPE_CHECKING:
    from ..async_handle import AsyncHandle
    from ..session import Session


@dataclass(frozen=True, slots=True)
class Options:
    """Limits of a server, and what it reports.

    ``name``: the model's name. ``keys``: SHA-256 of the API keys; empty asks for none. ``max_waiting``: requests that may wait
    for a slot. ``max_concurrency``: HTTP requests at a time. ``max_tokens``: new tokens of a request; None: what fits.
    ``deadline``: seconds of a request, from its arrival; None: no limit. ``body_seconds``: for a body to arrive.
    ``client_seconds``: for the head of a request to arrive, and for a client that doesn't read to read on. ``stall_seconds``: a
    step that takes longer makes the server unready. ``drain_seconds``: what running requests have left when the server is told to
    stop. ``acceptance_metrics``: every answer reports its acceptance. ``otel``: each request is a span of OpenTelemetry.
    """

    name: str = "model"
    keys: frozenset[bytes] = frozenset()
    max_waiting: int = 64
    max_concurrency: int = 256
    max_body_bytes: int = 2 << 20
    max_tokens: int | None = None
    max_stops: int = 16
    deadline: float | None = None
    body_seconds: float = 30.0
    client_seconds: float = 30.0
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    acceptance_metrics: bool = False
    otel: bool = False


@dataclass(slots=True, eq=False)
class Choice:
    """One generation under way, and what of it was handed over."""

    index: int
    handle: AsyncHandle
    prompt: list[int]
    arrived: float
    metrics: Metrics
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None
    first: float | None = None
    _newest: float | None = None
    _closed: bool = False

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield the chunks, counted."""
        async for chunk in self.handle.chunks():
            if chunk.token_ids:
                self._newest = self.metrics.tokens(len(chunk.token_ids), self.arrived, self._newest)
                self.first = self._newest if self.first is None else self.first
                self.token_ids += chunk.token_ids
            if chunk.finish_reason is not None:
                self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
            yield chunk

    def close(self) -> None:
        """End it if it is under way, and count it once."""
        self.handle.cancel()
        if not self._closed:
            self._closed = True
            self.metrics.ended(self.finish_reason or "abort", self.arrived, len(self.prompt), self.stats)


class Service:
    """Owns the session of a server, and says who may use it. ``spans``: where its requests are traced to, if they are."""

    def __init__(self, options: Options, spans: Spans | None = None) -> None:
        """Set the state up. Without ``spans``, the environment says where they go if the options ask for them.

        Raises:
            MissingDependencyError, UsageError: spans can't go there; see :meth:`.spans.Spans.from_environment`.
        """
        self.options = options
        self.spans = Spans.from_environment(options.name) if spans is None and options.otel else spans
        self.started = time.time()
        self.draining = False
        self._served: AsyncSession | None = None
        self._admitted = 0
        self._open: set[Choice] = set()
        self._pool = ThreadPoolExecutor(2, "medusa-deploy-tokenize")
        self.metrics = Metrics(lambda: None if self._served is None else self._served.health())

    def open(self, session: Session) -> None:
        """Serve from ``session`` from now on."""
        self._served = AsyncSession(session, max_waiting=self.options.max_waiting)

    async def close(self, *, cancel: bool = False) -> None:
        """Refuse new requests from now on; let running ones end, for ``drain_seconds`` at most."""
        self.draining = True
        if self._served is not None:
            await self._served.close(cancel=cancel, timeout=self.options.drain_seconds)
        self._pool.shutdown(wait=False)

    @property
    def session(self) -> Session:
        """The loaded session.

        Raises:
            ApiError: it isn't loaded, or the server is going down.
        """
        if self.draining:
            raise shutting_down()
        if self._served is None:
            raise not_ready()
        return self._served.session

    @property
    def stalled(self) -> bool:
        """Whether a step takes longer than it may. Asks the engine for nothing and waits for no lock of its own."""
        running = [choice.arrived for choice in self._open if not choice.handle.done]
        if self._served is None or not running:
            return False
        now, age = time.monotonic(), self._served.health().step_age
        busy = now - min(running)
        return min(busy, busy if age is None else age) > self.options.stall_seconds

    @property
    def state(self) -> str:
        """``loading``, ``ready``, ``stalled`` or ``closing``."""
        if self.draining:
            return "closing"
        if self._served is None:
            return "loading"
        return "stalled" if self.stalled else "ready"

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``work`` beside the event loop: tokenizers and templates may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments))

    @asynccontextmanager
    async def admitted(self, fields: Fields, prompts: list[dict[str, Any]], salt: str = "") -> AsyncIterator[list[Choice]]:
        """Check, encode and queue all that a request asks for; nothing of it is left behind afterwards.

        ``salt``: of the client, beside the request's own: prompts share a cache where both are equal.

        Raises:
            ApiError: the request is refused.
        """
        count = self._check(fields, len(prompts))
        assert self._served is not None
        slots = self._served.session.slots.slots
        if self._admitted + count > slots + self.options.max_waiting:
            raise api_error(QueueFullError(max(0, self._admitted - slots), self._served.health().retry_after))
        arrived, choices = time.monotonic(), list[Choice]()
        self._admitted += count
        try:
            for number, prompt in enumerate(prompts):
                choices += await self._submit(fields, prompt, number * fields.choices, arrived, salt)
                self._open.update(choices)
            yield choices
        finally:
            self._admitted -= count
            self._open.difference_update(choices)
            for choice in choices:
                choice.close()

    def _check(self, fields: Fields, prompts: int) -> int:
        """Return the number of generations that are asked for, if it is one that can be served."""
        slots, name = self.session.slots.slots, fields.model
        if name not in (None, "", self.options.name):
            message = f"the model {name[:80]!r} isn't served here; it is {self.options.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if not 1 <= fields.choices <= slots:
            message = f"n is {fields.choices}; this server has {slots} slots, so it is 1 to {slots}"
            raise ApiError(400, message, param="n", code="invalid_value")
        if fields.best_of not in (None, fields.choices):
            raise ApiError(400, "best_of other than n isn't supported", param="best_of", code="unsupported_parameter")
        if not 1 <= prompts * fields.choices <= slots + self.options.max_waiting:
            message = f"{prompts} prompts; this server takes {slots + self.options.max_waiting} answers at a time, and at least 1"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        if len(fields.stops) > self.options.max_stops or any(len(stop) > 1024 for stop in fields.stops):
            message = f"more than {self.options.max_stops} stop strings, or one of more than 1024 characters"
            raise ApiError(400, message, param="stop", code="invalid_value")
        if fields.deadline is not None and not fields.deadline > 0:
            raise ApiError(400, f"deadline is {fields.deadline}; it is positive", param="deadline", code="invalid_value")
        return prompts * fields.choices

    async def _submit(self, fields: Fields, prompt: dict[str, Any], first: int, arrived: float, salt: str) -> list[Choice]:
        served = self._served
        assert served is not None
        where = "messages" if "messages" in prompt else "prompt"
        choices: list[Choice] = []
        try:
            ids, grammar = await self.in_thread(self._encode, fields, prompt)
            count = self._new_tokens(fields, len(ids), chat=where == "messages")
            for index in range(first, first + fields.choices):
                request = Request(
                    token_ids=ids,
                    max_new_tokens=count,
                    params=fields.sampling(served.session.manifest.backbone.vocab_size, index),
                    stop=fields.stops,
                    include_stop=fields.include_stop_str_in_output,  # type: ignore[arg-type]
                    ignore_eos=fields.ignore_eos,  # type: ignore[arg-type]
                    priority=fields.priority,  # type: ignore[arg-type]
                    deadline=self._deadline(fields, arrived),
                    logprobs=fields.top,
                    grammar=grammar,
                    cache_salt=f"{salt}:{fields.cache_salt or ''}",
                )
                choices.append(Choice(index, await served.submit(request), ids, arrived, self.metrics))
        except BaseException as error:
            for choice in choices:
                choice.handle.cancel()
            if not isinstance(error, Exception):
                raise
            raise api_error(error, param=fields.grammar_field if isinstance(error, GrammarError) else where) from error
        return choices

    def _encode(self, fields: Fields, prompt: dict[str, Any]) -> tuple[list[int], Grammar | None]:
        session = self.session
        return session.encode(Request(**prompt)), fields.grammar(session.encoder)

    def _new_tokens(self, fields: Fields, prompt_tokens: int, *, chat: bool) -> int:
        """Return how many tokens may be emitted: what is asked for, or what fits."""
        (name, asked), capacity = fields.limit, self.session.manifest.limits.capacity
        most = self.options.max_tokens
        room = capacity - prompt_tokens
        if room < 1:
            message = f"the prompt has {prompt_tokens} tokens, and {capacity} fit, the answer's included"
            raise CapacityError(message, hint="shorten it")
        if asked is None:
            return min(room, most or room) if chat else min(16, room, most or room)
        if asked < 1 or (most is not None and asked > most):
            bounds = "at least 1" if most is None else f"1 to {most}"
            raise ApiError(400, f"{name} is {asked}; it is {bounds}", param=name, code="invalid_value")
        if asked > room:
            message = f"{prompt_tokens} prompt tokens + {asked} new tokens exceed the {capacity} that fit"
            raise ApiError(400, message, param=name, code="context_length_exceeded")
        return asked

    def _deadline(self, fields: Fields, arrived: float) -> float | None:
        asked = [each for each in (fields.deadline, self.options.deadline) if each is not None]
        return max(1e-6, min(asked) - (time.monotonic() - arrived)) if asked else None
