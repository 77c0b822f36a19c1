"""Starts ``medusa-deploy serve`` in a process of its own, and ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...runtime.errors import UsageError


@contextmanager
def own_server(bundle: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Serve ``bundle`` on a free port, with ``options`` of the verb; yields the address once it takes requests.

    Raises:
        UsageError: the server ended before that.
    """
    command = [sys.executable, "-m", "medusa_deploy", "serve", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url, lines = "", list[str]()
        try:
            for line in process.stderr:
                lines.append(line)
                told = json.loads(line) if line.startswith("{") else {}
                url = told.get("url", url)
                if told.get("event") == "ready":
                    break
            else:
                told_last = "".join(lines[-5:]).strip()
                raise UsageError(f"the server didn't start: {told_last}", hint="try: medusa-deploy serve BUNDLE")
            drained = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # noqa: S607
            try:
                yield url
            finally:
                process.terminate()
                process.wait(60)
                drained.wait(10)
        finally:
            process.kill()
