"""Whatever comes over a socket is answered or dropped: no status of 500 or more, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

pytest.importorskip("starlette")

from support.raw_http import Connection, ask
from support.served import Served
from support.soaking import FULL

_CLIENT_SECONDS = 1.0
_CASES = 2500 if FULL else 120
_STATUS: Counter[int] = Counter()


@pytest.fixture(scope="module")
def server(speaking_bundle: Path, figures: dict[str, Any]) -> Iterator[Served]:
    """A server that is looked at when all of this module's tests have had their way with it."""
    running = Served(
        speaking_bundle, 2, body_seconds=2.0, client_seconds=_CLIENT_SECONDS, max_tokens=20, max_body_bytes=4 << 20, max_waiting=8
    )
    before = running.census()
    yield running
    after = running.settled(lambda found: all(found[name] <= before[name] for name in found if name != "rss"))
    leaked = {name: after[name] - before[name] for name in ("slots", "waiting", "tasks", "descriptors")}
    assert running.stop() == 0
    figures["http"] = {"cases": sum(_STATUS.values()), "status": dict(sorted(_STATUS.items())), "leaked": leaked}
    assert all(count <= 0 for count in leaked.values()), leaked
    assert max(_STATUS) < 500


@pytest.fixture(autouse=True)
def healthy(server: Served) -> Iterator[None]:
    """The server answers after every test as it did before."""
    yield
    status, body = asyncio.run(ask(server.port, "/v1/completions", {"prompt": "ab", "max_tokens": 2, "temperature": 0}))
    assert status == 200, body


def send_raw(port: int, data: bytes, seconds: float = 300) -> int:
    """Send bytes and read until the server closes; return the status, 0 where it closes without one."""
    return asyncio.run(_send_raw(port, data, seconds))


async def _send_raw(port: int, data: bytes, seconds: float = 300) -> int:
    answer = b""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            reading = asyncio.create_task(reader.read(1 << 16))  # it may answer before it has read everything
            with suppress(ConnectionError):
                await writer.drain()
            answer = await reading
            while await reader.read(1 << 16):
                pass
        except ConnectionError:
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    _STATUS[status] += 1
    return status


def _head(path: str, length: int, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


# -- structured ----------------------------------------------------------------------------------------------------

_PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/health", "/metrics"]
_NAMES = [
    "model", "messages", "prompt", "tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "best_of", "stream",
    "stream_options", "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "max_tokens", "max_completion_tokens", "priority", "deadline", "cache_salt", "ignore_eos", "response_format", "tools",
    "tool_choice", "echo", "suffix", "user", "metadata", "return_token_ids", "include_metrics", "add_special_tokens",
]  # fmt: skip
_INNER_NAMES = ["role", "content", "type", "text", "5", "include_usage"]
_LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 30) | st.integers(-(2**66), 2**66) | st.floats(width=32) | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "text", "json_object", "auto", "\x00", "\ud800", "1", 1e308, -0.0])
)  # fmt: skip
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_INNER_NAMES), inner, max_size=3),
    max_leaves=6,
)
_SENSIBLE = {"messages": [{"role": "user", "content": "ab"}], "prompt": "ab", "tokens": [5, 6]}


@settings(max_examples=_CASES, suppress_health_check=list(HealthCheck), database=None)
@given(
    path=st.sampled_from(_PATHS),
    fields=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5),
    sensible=st.sets(st.sampled_from(sorted(_SENSIBLE))),
    method=st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW"]),
)
def test_bodies_of_all_kinds(server: Served, path: str, fields: dict[str, Any], sensible: set[str], method: str) -> None:
    body = {"max_tokens": 2, **{name: _SENSIBLE[name] for name in sorted(sensible)}, **fields}
    sent = json.dumps(body).encode()
    assert send_raw(server.port, _head(path, len(sent), method) + sent) in (200, 400, 404, 405, 408, 413, 415, 422, 429)


# -- bytes ---------------------------------------------------------------------------------------------------------


def _mutated(good: bytes, chance: random.Random) -> bytes:
    """Change a request here and there: bytes, lines, lengths, line ends, and what is behind its end."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[place : place + chance.randint(1, 30)]
            case 2:
                data[place:place] = chance.randbytes(chance.randint(1, 20))
            case 3:
                data[place:place] = data[: chance.randrange(len(data) + 1)]
            case 4:
                other = [b"Content-Length: -", b"Content-Length: 9", b"Transfer-Encoding: "]
                data = data.replace(b"Content-Length: ", chance.choice(other))
            case 5:
                data = data.replace(b"\r\n", chance.choice([b"\n", b"\r", b"\r\n\r\n", b" \r\n\t"]), chance.randint(1, 5))
            case _:
                data += chance.choice([good, b"\r\n", b"0\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n"])
    return bytes(data)


def test_requests_whose_bytes_were_changed(server: Served) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 2, "stream": True}).encode()
    good = _head("/v1/completions", len(body)) + body
    chance, left = random.Random(11), iter(range(_CASES))  # noqa: S311 - no secret

    async def client() -> None:
        for _ in left:
            data = _mutated(good, chance)
            assert await _send_raw(server.port, data) < 500, data

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(40)))

    asyncio.run(clients())


# -- patience ------------------------------------------------------------------------------------------------------


def _closed_within(sockets: list[socket.socket], seconds: float) -> bool:
    end = time.monotonic() + seconds
    for each in sockets:
        each.settimeout(max(0.01, end - time.monotonic()))
        try:
            while each.recv(65536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_end_is_given_up(server: Served, sent: bytes) -> None:
    """Slow loris: many connections that send a byte now and then, and nothing complete."""
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        for each in slow:
            each.sendall(sent)
        end = time.monotonic() + _CLIENT_SECONDS * 0.6
        while sent and time.monotonic() < end:
            time.sleep(0.2)
            for each in slow:
                each.sendall(b"a")
        assert asyncio.run(ask(server.port, "/health", b"", method="GET"))[0] == 200
        assert _closed_within(slow, _CLIENT_SECONDS * 3)
    finally:
        for each in slow:
            each.close()


def test_a_second_head_that_does_not_end_is_given_up(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /heal")
        time.sleep(0.1)
        slow.sendall(b"t")
        assert _closed_within([slow], _CLIENT_SECONDS * 3 + 5)


def test_a_body_that_does_not_end_is_408(server: Served) -> None:
    async def slowly() -> int:
        async with Connection(server.port) as connection:
            await connection.send("/v1/completions", b'{"prompt": "' + b"a" * 2000, part=100)
            return await connection.head()

    assert asyncio.run(slowly()) == 408


def test_a_client_that_does_not_read_is_given_up(server: Served) -> None:
    """It asks for more than all buffers hold, and reads nothing."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        deaf.settimeout(_CLIENT_SECONDS * 10)
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                deaf.sendall(asked * 20)
            while deaf.recv(1):
                time.sleep(0.01)


# -- size ----------------------------------------------------------------------------------------------------------


def _chunks(body: bytes, size: int) -> bytes:
    pieces = (body[place : place + size] for place in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


_HEAD = _head("/v1/completions", 0).removesuffix(b"Content-Length: 0\r\n\r\n")


def test_a_huge_body_is_refused_before_it_is_read(server: Served) -> None:
    assert send_raw(server.port, _HEAD + b"Content-Length: 99999999999999\r\n\r\n{") == 413
    assert send_raw(server.port, _HEAD + b"Content-Length: 5000000\r\n\r\n" + b" " * 5_000_000) in (0, 413)
    assert send_raw(server.port, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(b" " * (6 << 20), 1 << 16)) in (0, 413)


def test_three_megabytes_in_tiny_chunks(server: Served) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 2, "user": "u" * 3_000_000}).encode()
    before = time.monotonic()
    assert send_raw(server.port, _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(body, 64), 60) in (200, 400, 408)
    assert time.monotonic() - before < 30


def test_a_million_stop_strings(server: Served) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 2, "stop": ["a"] * 1_000_000}, separators=(",", ":")).encode()
    assert send_raw(server.port, _HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, 30) in (400, 413)
    assert asyncio.run(ask(server.port, "/health", b"", method="GET"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"X-Header-%d: %d\r\n" % (number, number) for number in range(20_000)),
        b"X-Long: " + b"a" * 1_000_000 + b"\r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    ],
    ids=["many", "long", "no text", "two lengths", "two encodings", "expects", "upgrades"],
)
def test_headers_that_flood(server: Served, headers: bytes) -> None:
    assert send_raw(server.port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n") < 500
