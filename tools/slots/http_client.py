"""A client that streams answers of any server with OpenAI's interface, and notes when what came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...runtime.errors import UsageError


@dataclass(slots=True)
class Stream:
    """One answer as its client saw it. Times are of ``perf_counter``.

    ``due``: when the client wanted to ask. ``arrivals``: when each piece came; ``sizes``: its tokens, 1 where the server doesn't
    tell. ``queue_seconds``: from its arrival to a slot, where the server tells. ``status``: 0 where the connection failed.
    """

    due: float
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    queue_seconds: float | None = None
    finished: bool = False

    @property
    def first_token_seconds(self) -> float:
        """Time from when the client wanted to ask to the first piece."""
        return self.arrivals[0] - self.due

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(self.sizes)


class Server:
    """A server's address, as ``http://127.0.0.1:8000``."""

    def __init__(self, url: str, model: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server", hint="give one such as http://127.0.0.1:8000")
        self.host, self.port = parts.hostname, parts.port or 80
        self.model = model

    async def stream(self, body: Mapping[str, Any], due: float | None = None) -> Stream:
        """Ask for a completion and read it to its end. Failures are noted in what is returned."""
        found = Stream(time.perf_counter() if due is None else due)
        named = {} if self.model is None else {"model": self.model}
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            return found
        try:
            data = json.dumps({**named, **body, "stream": True}).encode()
            head = ["POST /v1/completions HTTP/1.1", f"Host: {self.host}", "Connection: close", "Content-Type: application/json"]
            writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
            found.status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            if found.status == 200:
                await self._read(reader, found)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError):
            found.finished = False
        finally:
            writer.close()
        return found

    async def _read(self, reader: asyncio.StreamReader, found: Stream) -> None:
        async for event in _events(reader):
            if event == "[DONE]":
                found.finished = True
                break
            piece = json.loads(event)
            if "error" in piece:
                break
            choice: dict[str, Any] = next(iter(piece["choices"]), {})
            size = len(choice["token_ids"]) if "token_ids" in choice else int(bool(choice.get("text")))
            if size:
                found.arrivals.append(time.perf_counter())
                found.sizes.append(size)
            found.queue_seconds = piece.get("metrics", {}).get("queue_seconds", found.queue_seconds)

    async def health_seconds(self) -> float:
        """Time that ``/health`` takes, over a connection of its own; infinite where it isn't 200."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(f"GET /health HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
            return time.perf_counter() - began if b" 200 " in await reader.readline() else float("inf")
        finally:
            writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Read the data of server-sent events. Lines that begin otherwise are sizes of chunks, or empty."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()
