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

from ..errors import UsageError
from .app import create_app
from .service import Options, Service

if TYPE_CHECKING:
    from ..session import Session

_log = logging.getLogger("medusa_deploy.serve")
_LAST_BYTES_SECONDS = 5


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


async def run(load: Callable[[], Session], options: Options, listening: socket.socket) -> None:
    """Serve on a listening socket. See :func:`serve`."""
    service = Service(options)
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
    )
    server = _Server(config)
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
    if loading.done():
        loading.result()
