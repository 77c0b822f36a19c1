"""A session for asyncio: one thread drives the engine, coroutines wait for what it emits."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from .arguments import integer
from .async_handle import AsyncHandle, Reader
from .errors import QueueFullError, SessionClosedError, StepError
from .loop.handle import Handle
from .request import Chunk, Generation, Request
from .session import Session, request_of


@dataclass(frozen=True, slots=True)
class Health:
    """The state of an :class:`AsyncSession` at one moment, read without waiting for the engine.

    ``running``: its requests that hold a slot. ``waiting``: those that are encoded or queued. ``step_age``: seconds since the
    newest step ended, None before the first one; a large age with ``running`` > 0 says that the engine hangs. ``closing``:
    whether new requests are refused. ``retry_after``: seconds until a slot is probably free, by the requests that ended lately.
    """

    running: int
    waiting: int
    slots: int
    step_age: float | None
    closing: bool
    retry_after: float = 0.0


class AsyncSession:
    """Serves coroutines of any number of event loops from one :class:`Session`, which may be used directly beside it.

    One thread of its own drives the session while requests are under way, and wakes the readers of a step by one call for each
    event loop. Prompts are encoded in two further threads. Close it, or use it as an asynchronous context manager.
    """

    def __init__(self, session: Session, *, max_waiting: int = 64) -> None:
        """``max_waiting``: requests that may wait while all slots are taken; one more is refused.

        Raises:
            UsageError: ``max_waiting`` isn't an integer from 0.
        """
        self.session = session
        self.max_waiting = integer("max_waiting", max_waiting, 64, low=0)
        self._lock = threading.Lock()
        self._open: dict[Reader, Handle | None] = {}  # under the lock; None while the prompt is encoded
        # A SimpleQueue may be put into anywhere, in the middle of a get, too: the garbage collector cancels requests.
        self._news: SimpleQueue[Reader | None] = SimpleQueue()
        self._closing = self._cancelling = False
        self._ended: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(2, "medusa-deploy-encode")
        self._mean_seconds = 1.0  # that a request lately held its slot
        self._at_exit = partial(_call, weakref.WeakMethod(self._stop))
        atexit.register(self._at_exit)

    # -- generation ------------------------------------------------------------------------------------------------

    async def generate(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> Generation:
        """Generate to the end; see :meth:`Session.generate`. Cancelling the task cancels the request.

        Raises:
            QueueFullError, SessionClosedError: see :meth:`submit`.
            DeployError: the request is refused, or its generation failed.
        """
        handle = await self.submit(request_of(prompt, speculative, options))
        try:
            return await handle.result()
        finally:
            handle.cancel()

    async def stream(self, prompt: str | None = None, *, speculative: bool = True, **options: Any) -> AsyncGenerator[Chunk, None]:
        """Generate step by step. Closing the iterator, or cancelling the task that reads it, cancels the request.

        Raises:
            QueueFullError, SessionClosedError: see :meth:`submit`; when the first chunk is asked for.
            DeployError: when the first chunk is asked for: the request is refused; later: its generation failed.
        """
        handle = await self.submit(request_of(prompt, speculative, options))
        try:
            async for chunk in handle.chunks():
                yield chunk
        finally:
            handle.cancel()

    async def submit(self, request: Request) -> AsyncHandle:
        """Encode and queue a request. Its handle yields chunks and the result, and cancels it.

        The request's deadline counts from here.

        Raises:
            QueueFullError: all slots are taken, and ``max_waiting`` requests wait already.
            SessionClosedError: the session is closing.
            DeployError: the request is refused.
        """
        reader, since = Reader(), time.monotonic()
        self._reserve(reader)
        try:
            work = partial(self.session.prepare, request, notify=partial(self._news.put, reader), since=since)
            handle = await reader.loop.run_in_executor(self._pool, work)
            self._enter(reader, handle)
        except BaseException:
            self._leave(reader)
            raise
        return AsyncHandle(handle, reader)

    # -- state -----------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """The session's state now."""
        with self._lock:
            handles, closing = list(self._open.values()), self._closing
        states = ["waiting" if handle is None else handle.sequence.state for handle in handles]
        waiting, stepped, slots = states.count("waiting"), self.session.loop.stepped, self.session.slots.slots
        running = len(states) - states.count("done") - waiting
        age = None if stepped is None else time.monotonic() - stepped
        return Health(running, waiting, slots, age, closing, self._mean_seconds / slots)

    async def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109 - it doesn't give up
        """Take no more requests, let those under way end, and stop the threads. May be called again.

        ``cancel``: end the requests before their next step instead. ``timeout``: seconds after which they are ended so.
        """
        with self._lock:
            self._closing = True
            if self._thread is None and not self._ended.done():
                self._ended.set_result(None)
        self._news.put(None)
        if cancel:
            self._cancel_all()
        ended = asyncio.wrap_future(self._ended)
        await asyncio.wait([ended], timeout=timeout)  # unlike wait_for, it leaves the future alone when it is cancelled
        if not ended.done():
            self._cancel_all()
            await asyncio.wait([ended])
        if self._thread is not None:
            self._thread.join()  # it is at its end
        self._pool.shutdown(wait=False)
        atexit.unregister(self._at_exit)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close; an exception in the block cancels what is under way."""
        await self.close(cancel=kind is not None)

    # -- any thread ------------------------------------------------------------------------------------------------

    def _reserve(self, reader: Reader) -> None:
        slots = self.session.slots.slots
        with self._lock:
            if self._closing:
                raise SessionClosedError("the session is closing", hint="send the request to another one")
            under_way = sum(handle is None or not handle.done for handle in self._open.values())
            if under_way >= slots + self.max_waiting:
                raise QueueFullError(under_way - slots, self._mean_seconds / slots)
            if self._thread is None:
                thread = threading.Thread(target=self._drive, name="medusa-deploy", daemon=True)
                thread.start()
                self._thread = thread
            self._open[reader] = None

    def _enter(self, reader: Reader, handle: Handle) -> None:
        with self._lock:
            if self._cancelling:
                raise SessionClosedError("the session was closed", hint="send the request to another one")
            self._open[reader] = handle
            self.session.loop.submit(handle)
        self._news.put(reader)

    def _leave(self, reader: Reader) -> None:
        with self._lock:
            handle = self._open.pop(reader, None)
        if handle is not None:
            handle.cancel()
        self._news.put(None)

    def _cancel_all(self) -> None:
        with self._lock:
            self._cancelling = True
        for handle in self._handles():
            handle.cancel()

    def _handles(self) -> list[Handle]:
        with self._lock:
            return [handle for handle in self._open.values() if handle is not None]

    def _stop(self) -> None:
        """End what is under way when the program ends: an engine call must not outlive the interpreter."""
        if self._thread is not None:
            self._closing = True
            self._cancel_all()
            self._news.put(None)
            self._thread.join(10)

    # -- the driving thread ----------------------------------------------------------------------------------------

    def _drive(self) -> None:
        try:
            while not (self._closing and not self._open):
                if self._handles():
                    self._step()
                self._wake([self._news.get(), *self._more_news()])
        except BaseException as error:  # a bug of this class: no reader may hang because of it
            self._closing = True
            self._abort(error)
            self._wake(self._more_news())
            raise
        finally:
            self._ended.set_result(None)

    def _step(self) -> None:
        """Run the session until there is news. Errors that belong to no request end all of this session's."""
        try:
            self.session.driver.until(lambda: not self._news.empty())
        except BaseException as error:  # noqa: BLE001 - a caller's function may raise SystemExit; the thread goes on
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        cause = error if isinstance(error, Exception) else StepError(f"the step was ended by {error!r}", hint="send it again")
        for handle in self._handles():
            handle.abort(cause)

    def _more_news(self) -> list[Reader | None]:
        news: list[Reader | None] = []
        with suppress(Empty):
            while True:
                news.append(self._news.get_nowait())
        return news

    def _wake(self, news: list[Reader | None]) -> None:
        """Wake readers by one call for each event loop. Forgets the requests that have ended."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Reader]] = {}
        for reader in dict.fromkeys(reader for reader in news if reader is not None):
            by_loop.setdefault(reader.loop, []).append(reader)
            handle = self._open.get(reader)
            if handle is not None and handle.done:
                with self._lock:
                    self._open.pop(reader, None)
                stats = handle.sequence.stats
                if stats.prompt_tokens:
                    self._mean_seconds += 0.2 * (stats.prefill_seconds + stats.decode_seconds - self._mean_seconds)
        for loop, its_readers in by_loop.items():
            try:
                loop.call_soon_threadsafe(_set_events, [reader.event for reader in its_readers])
            except RuntimeError:  # the event loop is closed: nobody reads any more
                for reader in its_readers:
                    if (handle := self._open.get(reader)) is not None:
                        handle.cancel()


def _set_events(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (bound := method()) is not None:
        bound()
