"""Measures the cost of a Medusa step over a plain one: four heads at one row, with own, shared and pruned projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ..torch_reference.rig import Rig

SOURCE = "arXiv 2401.10774, Medusa-2 on Vicuna, tree of 64 rows, measured by its authors on an A100"
PUBLISHED = {"7b": 3.47, "13b": 3.51}
"""Tokens a step that ``SOURCE`` reports. Random weights accept nothing, so acceptance isn't measured here."""

_FEWEST_ROWS = 8


def run(options: Options, report: Report) -> None:
    """Put ``results[size]``: plain ms, and ms and ratio of each projection and number of rows.

    A projection to a published acceptance stands apart, with its label.
    """
    from ..torch_reference.rig import each_size

    each_size(options, report, _overhead)


def _overhead(rig: Rig, report: Report) -> None:
    from ..torch_reference.weights import PROJECTIONS

    length = rig.shapes.lengths[0]
    plain = rig.time_step(1, length)
    heads: dict[str, Any] = {}
    entry: dict[str, Any] = {"dtype": rig.options.dtype, "length": length, "plain": plain, "heads": heads, "notes": rig.notes}
    for kind in PROJECTIONS:
        heads[kind] = {}
        for rows in [rows for rows in rig.options.rows if rows >= _FEWEST_ROWS]:
            report.check_time(30)
            measured = rig.time_step(rows, length, kind)
            heads[kind][str(rows)] = {**measured, "overhead": measured["ms"] / plain["ms"]}
            report.put(rig.size, entry)
    if rig.size in PUBLISHED and rig.options.device == "cuda":
        report.put(rig.size, entry | {"projection": project(PUBLISHED[rig.size], heads)})


def project(tokens_per_step: float, heads: dict[str, Any]) -> dict[str, Any]:
    """Project the measured overheads to an acceptance that somebody else measured. It is no speed-up of this project."""
    return {
        "measured": False,
        "meaning": "published tokens a step ÷ measured overhead; the acceptance was not measured here",
        "acceptance_source": SOURCE,
        "tokens_per_step": tokens_per_step,
        "speedup_if_so": {kind: tokens_per_step / rows["64"]["overhead"] for kind, rows in heads.items() if "64" in rows},
    }
