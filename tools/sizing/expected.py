"""Says what speed-up heads promise before they are exported: counted paths, and step times that bench measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import HeadsError, UsageError
from ...runtime.files.heads import HeadConfig, config_from_json
from ...runtime.files.heads_file import CONFIG_NAME, read_json
from ...runtime.files.json_file import read_json_file
from ...runtime.tree import RankPath
from ..measure.row_sweep import suggest

_MOST_BYTES = 64 << 20
_SWEEP = "measure them: medusa-deploy bench BUNDLE --sweep --json FILE; a bundle without heads will do: export --no-heads"


@dataclass(frozen=True, slots=True)
class Expected:
    """What steps of ``rows`` rows promise: ``tokens_per_step`` over all positions of held-out answers, ``ms`` as measured."""

    rows: int
    ms: float
    tokens_per_step: float
    speedup: float


def is_heads_folder(form: str | None) -> bool:
    """True if ``--heads`` names a folder, rather than a form."""
    return form is not None and (Path(form) / CONFIG_NAME).is_file()


def heads_config(folder: str) -> HeadConfig:
    """Read the form of heads that ``train`` wrote.

    Raises:
        HeadsError: the config isn't one of this program.
    """
    return config_from_json(read_json(Path(folder) / CONFIG_NAME))


def expected_speed(folder: str, bench: Path) -> tuple[Expected, ...]:
    """Combine the paths that were right on held-out answers with a report's step times by rows, for every size in it.

    Raises:
        HeadsError: the heads' config holds no rates of paths.
        UsageError: the report holds no times by rows.
    """
    rates, milliseconds = _rates(folder), _milliseconds(bench)
    return tuple(
        Expected(found["rows"], milliseconds[found["rows"]], found["tokens_per_step"], found["speedup"])
        for found in suggest(rates, milliseconds)
    )


def _rates(folder: str) -> dict[RankPath, float]:
    pairs = read_json(Path(folder) / CONFIG_NAME).get("path_rates")
    try:
        rates = {tuple(int(rank) for rank in path): float(rate) for path, rate in pairs or ()}
    except (TypeError, ValueError):
        rates = {}
    if not rates:
        raise HeadsError(
            f"{folder} doesn't say how often paths were right", hint="train counts it; others: export, then medusa-deploy tree"
        )
    return rates


def _milliseconds(bench: Path) -> dict[int, float]:
    report = read_json_file(bench, limit=_MOST_BYTES, error=UsageError, hint=_SWEEP)
    try:
        times = {int(rows): float(ms) for rows, ms in report["sweep"]["ms_by_rows"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        times = {}
    if 1 not in times or not all(0 < ms < float("inf") for ms in times.values()):
        raise UsageError(f"{bench} holds no step times by rows", hint=_SWEEP)
    return times
