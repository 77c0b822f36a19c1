"""Runs the application: listens at once, loads beside it, and lets streams end when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..errors import UsageError
from .app import create_app
from .service import Options, Service

if TYPE_CHECKING:
    from ..session import Session

_log = logging.getLogger("medusa_deploy.serve")
_LAST_BYTES_SECONDS = 5


class ImpatientProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """Closes connections whose client lets the server wait: for the rest of a request's head, or until it reads on.

    uvicorn waits for both without an end, and each connection is a descriptor.
    """

    seconds = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.flow.write_paused:
                self._go_on()  # the body has a limit of its own
        elif self._timer is None:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._go_on()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._wait()  # what a client doesn't read keeps a closed connection open

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._go_on()
        self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end the process by the signal instead of with exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(load: Callable[[], Session], options: Options, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT; a second one cancels what is under way. ``port`` 0 takes a free one.

    Raises:
        UsageError: the address can't be bound.
        DeployError: the bundle can't be loaded.
    """
    listening = bind(host, port)
    with listening:
        asyncio.run(run(load, options, listening))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises:
        UsageError: the address can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UsageError(f"can't listen on {host}:{port}: {error}", hint="choose another --host or --port") from None


def configured(service: Service) -> uvicorn.Config:
    """Return how uvicorn serves ``service``."""
    return uvicorn.Config(
        create_app(service),
        http=type("Protocol", (ImpatientProtocol,), {"seconds": service.options.client_seconds}),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )


async def run(load: Callable[[], Session], options: Options, listening: socket.socket) -> None:
    """Serve on a listening socket. See :func:`serve`."""
    service = Service(options)
    server = _Server(configured(service))
    stopping: set[asyncio.Task[None]] = set()

    async def stop(*, cancel: bool) -> None:
        await service.close(cancel=cancel)
        server.should_exit = True

    def told() -> None:
        again, service.draining = service.draining, True
        _log.info("stopping", extra={"fields": {"now": again}})
        stopping.add(asyncio.create_task(stop(cancel=again)))

    async def open_when_loaded() -> None:
        try:
            session = await asyncio.to_thread(load)
            service.open(session)
        except BaseException:
            server.should_exit = True
            raise
        _log.info("ready", extra={"fields": {"model": options.name, "slots": session.slots.slots}})

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    host, port = listening.getsockname()[:2]
    _log.info("listening", extra={"fields": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})
    loading = asyncio.create_task(open_when_loaded())
    try:
        await server.serve(sockets=[listening])
    finally:
        if not service.draining:
            await service.close()
        if service.spans is not None:
            await asyncio.to_thread(service.spans.close)
    if loading.done():
        loading.result()
