"""Draws the report of ``bench --slots`` as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..page.document import card, document, table
from ..page.svg_chart import Series, bars, lines, short
from .report import HEADERS, lines_of, title

_STYLES = ("a", "b", "c", "d")


def page(report: Mapping[str, Any]) -> str:
    """Draw the whole page: total rate, rate of a request, gaps and first tokens by requests at a time, and the table."""
    loads = report["slots"]
    labels = [str(load["slots"]) for load in loads]
    totals = [_series(loads, way, ("tokens_per_s",)) for way in _ways(loads)]
    rates = _pairs(loads, ("request_tokens_per_s", "median"), ("request_tokens_per_s", "worst"), "worst")
    gaps = _pairs(loads, ("chunk_gap_s", "p50"), ("chunk_gap_s", "p99"), "99th percentile", 1e3)
    firsts = _pairs(loads, ("first_token_s", "p50"), ("first_token_s", "p99"), "99th percentile", 1e3)
    axis = "requests at a time"
    charts = [
        card("Tokens/s of all requests", bars(labels, totals, axis), "Prefills included."),
        card("Tokens/s of one request", lines(labels, rates, axis, short), "From its first chunk on; pale: the worst request."),
        card("Gap between two chunks, ms", lines(labels, gaps, axis, short), "As a user sees it; pale: the 99th percentile."),
        card("Time to the first token, ms", lines(labels, firsts, axis, short), "From asking; pale: the 99th percentile."),
    ]
    measured = f"{report['prompts']} prompts × {report['repeats']}, up to {report['max_new_tokens']} tokens each"
    where = f"{report['environment']['cpu']}, {report['environment']['date']}"
    facts = escape(json.dumps(report["environment"], indent=1, ensure_ascii=False))
    body = [
        f'<h1>Several requests at a time</h1>\n<p class="quiet">{escape(f"{measured}; {where}")}</p>',
        f'<div class="grid">{"".join(charts)}</div>',
        f'<h2>In numbers</h2>\n<div class="card wide">{table(HEADERS, lines_of(report))}</div>',
        f'<details class="card"><summary>Environment</summary><pre>{facts}</pre></details>',
    ]
    return document("Several requests at a time", body)


def _ways(loads: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in loads[0] if name != "slots"]


def _pairs(
    loads: Sequence[Mapping[str, Any]], main: Sequence[str], pale: Sequence[str], words: str, factor: float = 1.0
) -> list[Series]:
    """Two lines for each way: a figure, and a pale one of its bad cases."""
    found = []
    for way in _ways(loads):
        bad = _series(loads, way, pale, factor)
        found += [_series(loads, way, main, factor), bad._replace(name=f"{bad.name}, {words}", style=f"{bad.style} soft")]
    return found


def _series(loads: Sequence[Mapping[str, Any]], way: str, path: Sequence[str], factor: float = 1.0) -> Series:
    values = []
    for load in loads:
        value = load[way]
        for key in path:
            value = value[key]
        values.append(factor * value)
    return Series(title(way), _STYLES[_ways(loads).index(way) % len(_STYLES)], values)
