"""An HTTP client that can behave badly: it sends in pieces, leaves at any moment, and resets its socket."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Self


class Connection:
    """One connection for one request. Use it as an asynchronous context manager."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Close the socket by RST: what is on its way is lost."""
        own = self.writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def send(self, path: str, body: bytes, *, part: int | None = None, headers: str = "", method: str = "POST") -> None:
        """Send a request, or its first ``part`` bytes of body."""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{headers}"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:part])
        await self.writer.drain()

    async def head(self) -> int:
        """Read status and headers."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        pairs = (line.partition(":") for line in lines[1:] if line)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        return self.status

    async def parts(self) -> AsyncIterator[bytes]:
        """Read the body as it comes."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))
            return
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def body(self) -> bytes:
        """Read the whole body."""
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Read the events of a stream; a stream that doesn't end with ``[DONE]`` is an error."""
        text, ended = b"", False
        async for part in self.parts():
            text += part
            while b"\n\n" in text:
                event, _, text = text.partition(b"\n\n")
                ended = event == b"data: [DONE]"
                if not ended:
                    yield json.loads(event.removeprefix(b"data: "))
        assert ended, "the stream was cut off"


async def ask(port: int, path: str, body: Any, *, method: str = "POST", headers: str = "") -> tuple[int, bytes]:
    """Send one request and read its answer."""
    async with Connection(port) as connection:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        await connection.send(path, sent, method=method, headers=headers)
        return await connection.head(), await connection.body()
