"""A submitted request, as a coroutine sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from .loop.handle import Handle
from .request import Chunk, Generation


class Reader:
    """The coroutine side of one request: whose event to set, in which event loop."""

    __slots__ = ("event", "loop")

    def __init__(self) -> None:
        self.loop, self.event = asyncio.get_running_loop(), asyncio.Event()


class AsyncHandle:
    """A submitted request. All methods belong to the event loop that submitted it; ``cancel`` may be called anywhere.

    A handle that is dropped before its request has ended cancels it.
    """

    def __init__(self, handle: Handle, reader: Reader) -> None:
        self._handle, self._reader = handle, reader

    @property
    def done(self) -> bool:
        """Whether the request has ended and its slot is free."""
        return self._handle.done

    @property
    def error(self) -> Exception | None:
        """The error that ended it, if one did."""
        return self._handle.error

    def cancel(self) -> None:
        """End the request before its next step; what was emitted stays."""
        self._handle.cancel()

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks as they are emitted, each to one reader, and the one with the finish reason last, to every reader.

        Raises:
            Exception: the error that ended the request.
        """
        handle = self._handle
        while True:
            last, chunk = handle.last, handle.take()  # in this order: nothing comes behind the last chunk
            if chunk is not None:
                yield chunk
            elif last is not None:
                yield last
                break
            else:
                await self._news()
        if handle.error is not None:
            raise handle.error

    async def wait(self) -> Generation:
        """Wait for the end and return the generation, one that ended with an error too."""
        while not self._handle.done:
            await self._news()
        return self._handle.wait()

    async def result(self) -> Generation:
        """Wait for the end and return the generation.

        Raises:
            Exception: the error that ended the request.
        """
        generation = await self.wait()
        if generation.error is not None:
            raise generation.error
        return generation

    async def _news(self) -> None:
        # News that came before this line were visible to the caller's look at the handle: events are set in this thread alone.
        self._reader.event.clear()
        await self._reader.event.wait()

    def __del__(self) -> None:
        self._handle.cancel()
