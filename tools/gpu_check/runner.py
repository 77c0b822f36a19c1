"""The command: runs every stage in a process of its own, merges the reports into one JSON, and prints a table last."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...runtime.errors import DeployError
from ..console import say, write_json
from .machine import machine_facts
from .options import SCRATCH, Options, command_line, parse
from .table import describe_check

NAME = "gpu_check.json"
SCHEMA_VERSION = 1
_STDERR = 2
_PROGRAM = ["-m", str(__package__)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for. Returns 1 if nothing can be written, or with ``--strict`` if one isn't ok; else 0."""
    options = parse(arguments)
    if options.worker is not None:
        from .worker import run_stage

        run_stage(options.worker, options, _stage_path(options, options.worker))
        return 0
    try:
        report = check(options)
    except DeployError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was measured is kept")
        return 130
    text = describe_check(report)
    (options.out / "gpu_check.txt").write_text(text + "\n", "utf-8")
    print(text)
    failed = [name for name in options.stages if report["stages"][name]["status"] != "ok"]
    return 1 if options.strict and failed else 0


def check(options: Options) -> dict[str, Any]:
    """Run the stages one after another and merge their reports into what earlier calls left in ``--out``.

    Raises:
        OutputError: the folder can't be written to.
    """
    path = options.out / NAME
    report = _earlier(path) | {
        "schema_version": SCHEMA_VERSION,
        "medusa_deploy": __version__,
        "machine": machine_facts(),
    }
    report.setdefault("stages", {})
    write_json(report, path)
    for stage in options.stages:
        say(f"{stage} …")
        entry = _run_apart(stage, options)
        report["stages"][stage] = entry
        write_json(report, path)
        say(f"{stage}: {entry['status']} after {entry['seconds']:.0f} s")
    shutil.rmtree(options.out / SCRATCH, ignore_errors=True)
    return report


def _run_apart(stage: str, options: Options) -> dict[str, Any]:
    """Run one stage in a process of its own and end it when its time is up. Whatever it had found is kept."""
    path, limit = _stage_path(options, stage), options.limit_of(stage)
    path.unlink(missing_ok=True)
    started = time.monotonic()
    command = [sys.executable, "-B", *_PROGRAM, *command_line(options, stage)]
    # Compiled kernels go where everything goes, unless the caller keeps them; stages of one call share them.
    compiled = str((options.out / SCRATCH).absolute())
    search = [str(Path(__file__).absolute().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = {name: os.environ.get(name, compiled) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    added = {**caches, "PYTHONPATH": os.pathsep.join(search)}
    code: int | None
    # What it prints belongs to no result.
    with subprocess.Popen(command, stdout=_STDERR, env=os.environ | added) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        except BaseException:
            process.kill()
            raise
    entry = _earlier(path)
    path.unlink(missing_ok=True)
    entry = {"status": "running", "error": None, "skipped": {}, "wrong": {}, "results": {}} | entry
    entry["seconds"] = round(time.monotonic() - started, 1)
    if entry["status"] == "running":
        what = f"stopped after {limit:g} s" if code is None else f"the process ended with code {code}"
        status = "partial" if entry["results"] else "failed"
        entry |= {"status": status, "error": {"exception": "StageEnded", "message": what}}
    return {**entry, "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "device": options.device}


def _stage_path(options: Options, stage: str) -> Path:
    return options.out / f".{stage}.json"


def _earlier(path: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier call or another process wrote; empty when there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
