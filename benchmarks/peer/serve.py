"""One system in a process of its own, driven by JSON lines.

Usage: ``python -m peer.serve SYSTEM``, with ``benchmarks`` in PYTHONPATH. The first line out says whether the system is
installed. Then every command line in gets one line out:
``{"do": "load", …}`` with the fields of :class:`.base.Settings` → ``{"seconds"}``;
``{"do": "run", "token_ids", "max_new_tokens"}`` → ``{"token_ids", "seconds", "first_token_seconds", "steps"}``;
``{"do": "run_many", "prompts", "max_new_tokens"}`` → ``{"answers", "seconds"}``;
``{"do": "encode", "path", "prompts", "count"}`` (ours only) → ``{"prompts", "eos_token_ids", "manifest_sha256"}``;
``{"do": "quit"}`` → ``{"peak_rss_bytes"}``. What goes wrong is answered with ``{"error"}``.
Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from .base import Peer, Settings
from .install import folder_bytes, footprint
from .ours import Ours
from .systems import SYSTEMS


def hello(peer: Peer) -> dict[str, Any]:
    """Is the system here, in which versions, and what does it weigh?"""
    spec = importlib.util.find_spec(peer.module)
    if spec is None:
        return {"installed": False}
    sizes = footprint(peer.roots)
    versions = {name: _version(name) for name in (root.partition("[")[0] for root in peer.roots)}
    if isinstance(peer, Ours):
        # A development install lists no files of the package itself, and a bare clone has no metadata.
        assert spec.origin is not None
        sizes["medusa-deploy"] = folder_bytes(Path(spec.origin).parent)
        versions["medusa-deploy"] = importlib.import_module("medusa_deploy").__version__
    return {"installed": True, "python": sys.version.split()[0], "versions": versions, "install_bytes": sizes}


def serve(peer: Peer, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until ``quit`` or the end of the input."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    for line in commands:
        command = json.loads(line)
        what = command.pop("do")
        if what == "quit":
            say({"peak_rss_bytes": peak_rss()})
            return
        try:
            say(_COMMANDS[what](peer, command))
        except Exception as error:  # noqa: BLE001 - one system's failure is a line of the report
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]})


def _load(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    peer.load(Settings(**command))
    return {"seconds": time.perf_counter() - started}


def _run(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    answer = peer.run(**command)
    return {"seconds": time.perf_counter() - started, **asdict(answer)}


def _run_many(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    answers = peer.run_many(**command)
    return {"seconds": time.perf_counter() - started, "answers": answers}


def _encode(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(peer, Ours)
    return peer.encode(**command)


_COMMANDS: dict[str, Callable[[Peer, dict[str, Any]], dict[str, Any]]] = {
    "load": _load,
    "run": _run,
    "run_many": _run_many,
    "encode": _encode,
}


def peak_rss() -> int:
    """The most memory this process had resident, in bytes. Not ``ru_maxrss`` first: it counts the parent's, from before exec."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str]) -> None:
    """Say hello, then serve on stdin and stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer = SYSTEMS[argv[0]].peer
    greeting = hello(peer)
    answers.write(json.dumps(greeting) + "\n")
    answers.flush()
    if greeting["installed"]:
        serve(peer, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
