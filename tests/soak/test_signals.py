"""SIGTERM under load: ready goes off at once, every answer that began ends properly, and the process exits with 0."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from support.documents import ROOT
from support.raw_http import Connection

_AT_ONCE = 16


async def _start(bundle: Path, drain: float) -> tuple[asyncio.subprocess.Process, int]:
    paths = os.pathsep.join([str(ROOT / "src"), *sys.path])
    options = ["--port", "0", "--threads", "1", "--drain", str(drain)]
    command = [sys.executable, "-m", "medusa_deploy", "serve", str(bundle), *options]
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stderr is not None
    port = 0
    async for line in process.stderr:
        told = json.loads(line)
        if told["event"] == "listening":
            port = int(told["url"].rpartition(":")[2])
        if told["event"] == "ready":
            return process, port
    raise AssertionError("the server didn't start")


async def _client(port: int, index: int, ends: Counter[str]) -> None:
    """Stream answer after answer until the server takes no more."""
    while True:
        stream = index % 2 == 0
        body = {"prompt": "abc" * (1 + index), "max_tokens": 150, "ignore_eos": True, "temperature": 0, "stream": stream}
        try:
            async with Connection(port) as connection:
                await connection.send("/v1/completions", json.dumps(body).encode())
                if await connection.head() == 503:
                    ends["refused"] += 1
                    return
                assert connection.status == 200
                if stream:
                    reasons = [event["choices"][0]["finish_reason"] async for event in connection.events()]
                    reason = reasons[-1]
                else:
                    reason = json.loads(await connection.body())["choices"][0]["finish_reason"]
        except ConnectionRefusedError:
            ends["refused"] += 1
            return
        except (ConnectionResetError, asyncio.IncompleteReadError):
            ends["cut off" if connection.status else "not begun"] += 1
            return
        ends[reason] += 1


async def _once(bundle: Path, drain: float, chance: random.Random) -> dict[str, Any]:
    process, port = await _start(bundle, drain)
    ends: Counter[str] = Counter()
    try:
        clients = [asyncio.create_task(_client(port, index, ends)) for index in range(_AT_ONCE)]
        await asyncio.sleep(0.05 + 0.4 * chance.random())
        assert process.stderr is not None
        async with Connection(port) as watching:  # connected before the signal: it is answered while the others drain
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            while json.loads(await process.stderr.readline())["event"] != "stopping":
                pass
            draining = asyncio.create_task(_read_on(process.stderr))
            await watching.send("/health/ready", b"", method="GET")
            ready = await watching.head()
            told = time.monotonic() - began
        await asyncio.gather(*clients)
        code = await asyncio.wait_for(process.wait(), 60)
        await draining
        process._transport.close()  # type: ignore[attr-defined]  # else it is closed when its loop is gone
    finally:
        if process.returncode is None:
            process.kill()
    return {"code": code, "ready": ready, "told": told, "ends": ends}


async def _read_on(stream: asyncio.StreamReader) -> None:
    async for _ in stream:
        pass


def test_sigterm_under_load(speaking_bundle: Path, amount: Callable[[int, int], int], figures: dict[str, Any]) -> None:
    chance = random.Random(3)  # noqa: S311 - no secret
    drains = [0.1 if index % 2 else 20 for index in range(amount(2, 50))]
    found = [asyncio.run(_once(speaking_bundle, drain, chance)) for drain in drains]
    ends = sum((each["ends"] for each in found), Counter[str]())
    slowest = max(each["told"] for each in found)
    figures["sigterm"] = {"times": len(found), "ends": dict(sorted(ends.items())), "slowest_unready_s": round(slowest, 3)}
    assert [each["code"] for each in found] == [0] * len(found)
    assert [each["ready"] for each in found] == [503] * len(found)
    assert set(ends) <= {"length", "cancelled", "refused", "not begun"} and ends["length"] > 0
