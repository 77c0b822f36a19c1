"""Reads and writes polygraphy's files: inputs and results by name. Its log would go to stdout, which is for results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...runtime.errors import OutputError, UsageError

Arrays = Mapping[str, np.ndarray]


def write_inputs(path: Path, iterations: Sequence[Arrays]) -> None:
    """Write what ``--load-inputs`` reads."""
    _quiet()
    from polygraphy.json import save_json

    save_json([dict(arrays) for arrays in iterations], str(path))


def write_results(path: Path, runner: str, found: Arrays) -> None:
    """Write what ``--load-outputs`` reads: the outputs of one iteration of ``runner``.

    Raises:
        OutputError: the file system refused.
    """
    _quiet()
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add([dict(found)], runner_name=runner)
    try:
        results.save(str(path))
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}", hint="free some space, or name another folder") from error


def read_results(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read what ``--save-outputs`` wrote: the outputs of the first iteration, by runner.

    Raises:
        UsageError: the file holds no results.
    """
    _quiet()
    from polygraphy.comparator import RunResults
    from polygraphy.exception import PolygraphyException

    try:
        results = RunResults.load(str(path))
        found = {str(runner): {name: np.asarray(value) for name, value in each[0].items()} for runner, each in results.items()}
    except (PolygraphyException, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = str(error).strip().splitlines()[:1]
        raise UsageError(f"{path} holds no results of polygraphy: {''.join(why)[:200]}", hint="run commands.sh again") from None
    if not found:
        raise UsageError(f"{path} holds no results of polygraphy", hint="run commands.sh again")
    return found


def _quiet() -> None:
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1
