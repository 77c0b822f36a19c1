"""A real server on loopback, in a thread of its own, over a session of the test's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvicorn

from medusa_deploy.runtime import Request, Rows
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.serve.server import bind, configured
from medusa_deploy.runtime.serve.service import Options, Service
from medusa_deploy.runtime.session import Session

Drafting = TypeVar("Drafting", bound=Session)


def drafting(session: Drafting, rows: int = 12) -> Drafting:
    """Let every request verify so many rows in a step: steps of a fake engine cost nothing, so none would be chosen."""
    prepare = session.prepare

    def with_rows(request: Request, **options: Any) -> Handle:
        object.__setattr__(request, "drafting", Rows(rows))
        return prepare(request, **options)

    session.prepare = with_rows  # type: ignore[method-assign]
    return session


class Running:
    """A server that runs: its address, its service, and a plain HTTP client for it."""

    def __init__(self, url: str, service: Service, session: Session | None) -> None:
        self.url, self.service, self.session = url, service, session
        self.http = httpx.Client(base_url=url, timeout=60)

    def chat(self, **body: Any) -> httpx.Response:
        """Ask for a chat completion."""
        return self.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **body})

    def complete(self, prompt: Any = "ab", **body: Any) -> httpx.Response:
        """Ask for a completion."""
        return self.http.post("/v1/completions", json={"prompt": prompt, **body})


@contextmanager
def serving(session: Session | None, **options: Any) -> Iterator[Running]:
    """Serve ``session``; None stays in the state of loading. ``options`` are fields of ``Options``."""
    options.setdefault("name", "tiny")
    service = Service(Options(**options))
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(configured(service))

    async def run() -> None:
        if session is not None:
            service.open(session)
        await server.serve(sockets=[listening])
        await service.close(cancel=True)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, session)
    try:
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive(), "the server didn't end"
