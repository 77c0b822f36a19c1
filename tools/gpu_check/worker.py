"""Runs one stage in this process."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .options import Options
from .report import OutOfTimeError, Report, describe

# Seconds of its limit that a stage keeps for leaving: the interpreter and a GPU's memory take that long to go.
_RESERVE = 30.0


def run_stage(name: str, options: Options, path: Path | None = None) -> Report:
    """Run a stage to its end, its deadline or its first error. Its report is at ``path`` all the while.

    Its status becomes ``ok``; ``wrong``: a result is not what it must be; ``partial``: something was skipped or time ran out; or
    ``failed``: an error ended it.
    """
    limit = options.limit_of(name)
    report = Report(path, max(limit - _RESERVE, limit / 2))
    report.save()
    try:
        stage: Callable[[Options, Report], None] = importlib.import_module(f".stages.{name.replace('-', '_')}", __package__).run
        stage(options, report)
        report.status = "partial" if report.skipped else "ok"
    except OutOfTimeError as error:
        report.status, report.error = "partial", _facts(error)
    except Exception as error:  # one stage's error must not hide the others' results
        report.status, report.error = "failed", _facts(error)
        traceback.print_exception(error, file=sys.stderr)
    if report.wrong:
        report.status = "wrong"
    report.save()
    return report


def _facts(error: Exception) -> dict[str, str]:
    return {"exception": type(error).__name__, "message": describe(error)}
