"""Runs generations to their end, for answers in one piece and for streams, as long as the client stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..request import Chunk, TokenLogprob
from .answers import Answer
from .errors import ApiError, api_error, shutting_down
from .fields import Fields
from .service import Choice, Service

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed its connection before the answer was ready."""


class EventStream(StreamingResponse):
    """A stream of events that closes its generator, and what belongs to it, however it ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], owned: AsyncExitStack) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        self._events, self._owned = events, owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that leaves cancels them."""
        async with self._owned, aclosing(self._events):
            await super().__call__(scope, receive, send)


async def merged(choices: list[Choice]) -> AsyncIterator[tuple[Choice, Chunk]]:
    """Yield the chunks of all choices as they come.

    Raises:
        Exception: the error that ended one of them.
    """
    queue: asyncio.Queue[tuple[Choice, Chunk | Exception | None]] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async for chunk in choice.chunks():
                queue.put_nowait((choice, chunk))
            queue.put_nowait((choice, None))
        except Exception as error:  # noqa: BLE001 - raised by the reader
            queue.put_nowait((choice, error))

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            choice, chunk = await queue.get()
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                running -= 1
            else:
                yield choice, chunk
    finally:
        for task in tasks:
            task.cancel()


async def events(answer: Answer, fields: Fields, choices: list[Choice]) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream: an opening and pieces of each choice, then the usage if it is asked for."""
    try:
        for choice in choices:
            if (opening := answer.opening(choice)) is not None:
                yield _event(answer.piece([opening]))
        running = len(choices)
        async with aclosing(merged(choices)) as chunks:  # type: ignore[type-var]
            async for choice, chunk in chunks:
                reason = chunk.finish_reason
                if reason == "error":
                    continue  # the error itself follows
                running -= reason is not None
                if chunk.text or reason is not None or (chunk.token_ids and (fields.return_token_ids or chunk.logprobs)):
                    piece = answer.delta(choice, chunk.text, chunk.token_ids, chunk.logprobs, reason)
                    if piece is None:
                        continue
                    last = {} if running or fields.include_usage else answer.acceptance(choices)
                    yield _event(answer.piece([piece], **last))
        if fields.include_usage:
            yield _event(answer.piece([], **{"usage": answer.usage(choices), **answer.acceptance(choices)}))
    except Exception as error:  # noqa: BLE001 - the status was sent: what went wrong is said in the stream
        yield _event(api_error(error).body)
    yield b"data: [DONE]\n\n"


async def whole(answer: Answer, choices: list[Choice], service: Service) -> dict[str, Any]:
    """Run all choices to their end and return the answer.

    Raises:
        ApiError: the deadline passed, or the server stopped, before the first token.
        Exception: the error that ended one of them.
    """
    texts: dict[int, list[str]] = {choice.index: [] for choice in choices}
    logprobs: dict[int, list[TokenLogprob]] = {choice.index: [] for choice in choices}
    async with aclosing(merged(choices)) as chunks:  # type: ignore[type-var]
        async for choice, chunk in chunks:
            texts[choice.index].append(chunk.text)
            logprobs[choice.index] += chunk.logprobs or []
    if all(choice.finish_reason == "cancelled" and not choice.token_ids for choice in choices):
        if service.draining:
            raise shutting_down()
        raise ApiError(408, "the deadline passed before the first token", param="deadline", code="deadline_exceeded")
    return answer.whole([(choice, "".join(texts[choice.index]), logprobs[choice.index]) for choice in choices])


async def while_connected(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work``, and cancel it when the client leaves. The body must have been read.

    Raises:
        ClientGoneError: the client left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
