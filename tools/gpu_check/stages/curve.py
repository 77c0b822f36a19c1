"""Measures step time by number of rows: the torch reference of each size, and every executor that loads the bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ..torch_reference.rig import Rig


def run(options: Options, report: Report) -> None:
    """Put ``results[size]["lengths"][length][rows]`` and ``results["executors"][backend]``."""
    if options.bundle is not None:
        _executors(options, report)
    from ..torch_reference.rig import each_size

    each_size(options, report, _curve)


def _curve(rig: Rig, report: Report) -> None:
    entry: dict[str, Any] = {"dtype": rig.options.dtype, "lengths": {}, "notes": rig.notes}
    for length in rig.shapes.lengths:
        times: dict[str, Any] = {}
        entry["lengths"][length] = times
        for rows in rig.options.rows:
            report.check_time(30)
            measured = rig.time_step(rows, length)
            times[str(rows)] = measured | {"of_one_row": measured["ms"] / times["1"]["ms"] if rows > 1 else 1.0}
            report.put(rig.size, entry)
        times["1"]["gb_s"] = rig.step_bytes(length) / times["1"]["ms"] / 1e6
    report.put(rig.size, entry)


def _executors(options: Options, report: Report) -> None:
    from ...measure.row_sweep import row_sweep
    from ..executors import loaded_sessions

    found: dict[str, Any] = {}
    for backend, session in loaded_sessions(options, report):
        report.check_time(30)
        try:
            swept = row_sweep(session, rounds=min(options.repeats, 15))
            # Times only: a suggested size depends on acceptance, which isn't measured here.
            found[backend] = {name: swept[name] for name in ("context", "rounds", "ms_by_rows")}
        except Exception as error:
            report.skip(f"executor {backend}", error)
        report.put("executors", found)
