"""A server in a process of its own that says on SIGUSR1 what it holds: slots, tasks, descriptors, threads, memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from support.documents import ROOT


def census(slots: int, waiting: int, tasks: int) -> dict[str, int]:
    """What this process holds now."""
    rss = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"slots": slots, "waiting": waiting, "tasks": tasks, "descriptors": descriptors, "rss": rss}


def main(bundle: str, slots: str, options: str) -> None:
    """Serve ``bundle`` on a free port. Events are lines of JSON on stdout."""
    from medusa_deploy.runtime import load
    from medusa_deploy.runtime.serve.server import bind, run
    from medusa_deploy.runtime.serve.service import Options
    from medusa_deploy.runtime.session import Session

    sessions: list[Session] = []

    def loaded() -> Session:
        session = load(bundle, slots=int(slots), threads=1)
        sessions.append(session)
        return session

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def tell() -> None:
        [session] = sessions
        held = session.slots.slots - session.slots.free
        say({"event": "census", **census(held, len(session.loop._handles), len(asyncio.all_tasks()))})

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        with bind("127.0.0.1", 0) as listening:
            say({"event": "listening", "port": listening.getsockname()[1]})
            await run(loaded, Options(name="soaked", **json.loads(options)), listening)

    asyncio.run(serve())


class Served:
    """Starts such a process. ``options``: fields of the server's ``Options``."""

    def __init__(self, bundle: Path, slots: int, **options: Any) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *sys.path])
        command = [sys.executable, "-m", "support.served", str(bundle), str(slots), json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
        self.port = int(self._line("listening")["port"])
        end = time.monotonic() + 120
        while not self._ready():
            assert time.monotonic() < end and self.process.poll() is None, "the server doesn't get ready"
            time.sleep(0.05)

    def census(self) -> dict[str, int]:
        """Ask what the process holds."""
        self.process.send_signal(signal.SIGUSR1)
        found = self._line("census")
        del found["event"]
        return found

    def settled(self, true: Callable[[dict[str, int]], bool], seconds: float = 30) -> dict[str, int]:
        """Ask until ``true`` says yes, or so long; return the newest answer."""
        end = time.monotonic() + seconds
        while not true(found := self.census()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def stop(self) -> int:
        """End it by SIGTERM, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def _ready(self) -> bool:
        return httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200

    def _line(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if (found := json.loads(text))["event"] == event:
                return dict(found)
        raise AssertionError(f"the server ended with {self.process.wait(10)} before it said {event}")


if __name__ == "__main__":
    main(*sys.argv[1:])
