"""``bench --serve``: a real server under open-loop load, many streams at a time, and what HTTP costs a token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...runtime.errors import UsageError
from ...runtime.session import Session
from ..console import table
from ..page.document import card, document, table as html_table
from ..page.svg_chart import Series, lines, short
from .bench import Advance
from .http_client import Server
from .open_loop import Target, arrivals, http_cost, summary, users

HEADERS = (
    *("server", "requests/s", "asked", "finished", "refused", "goodput/s", "share", "tokens/s", "first token ms", "p99"),
    *("token gap ms", "p99", "queue ms", "p99", "slowest /health ms"),
)


_TARGET = Target()


def serving_bench(
    session: Session,
    servers: Mapping[str, Server],
    prompts: Sequence[list[int]],
    rates: Sequence[float],
    *,
    seconds: float = 30.0,
    streams: int = 64,
    max_new_tokens: int = 128,
    repeats: int = 1,
    target: Target = _TARGET,
    seed: int = 0,
    progress: Advance = lambda _done, _note: None,
) -> dict[str, Any]:
    """Drive each of ``servers`` at each of ``rates``, requests a second, for ``seconds``; the first one is the bundle's own.

    A request's times count from the moment at which it was due, so a server that can't keep up shows it. The own server then
    answers ``streams`` clients at a time: ``fairness`` is the most tokens that one of them got by the fewest. ``one_stream``
    compares the gap between tokens with that of ``session`` in this process. Other servers get the prompts as text.

    Raises:
        UsageError: nothing to measure, or no server answers.
    """
    if not rates or min(rates) <= 0 or seconds <= 0 or not prompts:
        raise UsageError("no rates, seconds or prompts to measure with", hint="give --rates 0.5,1,2")
    own, options = next(iter(servers)), {"max_tokens": max_new_tokens, "temperature": 0}
    ours = {"ignore_eos": True, "return_token_ids": True, "include_metrics": True, **options}
    bodies = {own: [{"prompt": prompt, **ours} for prompt in prompts]}
    bodies |= {name: [_as_text(session, prompt, options) for prompt in prompts] for name in servers if name != own}
    for name, server in servers.items():
        if not asyncio.run(server.stream(bodies[name][0])).finished:
            raise UsageError(f"the server {name} at {server.host}:{server.port} doesn't answer", hint="start it first")
    cost = http_cost(session, servers[own], bodies[own], repeats, progress)
    loads, done = [], 0
    for place, rate in enumerate(rates):
        for name, server in servers.items():
            progress(done, f"{name} at {rate:g} requests/s")
            load = asyncio.run(arrivals(server, bodies[name], rate, seconds, seed + place))
            loads.append({"server": name, "rate": rate, **summary(load, target)})
            progress(done := done + 1, f"{name} at {rate:g} requests/s")
    progress(done, f"{streams} streams")
    load, tokens = asyncio.run(users(servers[own], bodies[own], streams, seconds))
    crowd = {"streams": streams, "fairness": max(tokens) / max(1, min(tokens)), **summary(load, target)}
    settings = {"prompts": len(prompts), "max_new_tokens": max_new_tokens, "seconds": seconds, "seed": seed}
    goal = {"first_token_s": target.first_token_s, "token_gap_s": target.token_gap_s}
    return {**settings, "target": goal, "one_stream": cost, "loads": loads, "crowd": crowd}


def _as_text(session: Session, prompt: list[int], options: Mapping[str, Any]) -> dict[str, Any]:
    if session.codec is None:
        raise UsageError("other servers need text, and the bundle has no tokenizer", hint="drop --peer")
    return {"prompt": session.codec.decode(prompt), **options}


def _ms(quantiles: Mapping[str, float] | None) -> list[str]:
    return ["—", "—"] if quantiles is None else [f"{1e3 * quantiles[share]:.1f}" for share in ("p50", "p99")]


def lines_of(report: Mapping[str, Any]) -> list[list[str]]:
    """The report's table, a line for each server at each rate, under ``HEADERS``."""
    rows = []
    for load in report["loads"]:
        counts = [str(load[name]) for name in ("requests", "finished", "refused")]
        rates = [f"{load['goodput_per_s']:.2f}", f"{100 * load['goodput_share']:.0f} %", f"{load['tokens_per_s']:.1f}"]
        times = [*_ms(load["first_token_s"]), *_ms(load["token_gap_s"]), *_ms(load["queue_s"])]
        rows.append([load["server"], f"{load['rate']:g}", *counts, *rates, *times, f"{1e3 * load['slowest_health_s']:.1f}"])
    return rows


def describe_serving(report: Mapping[str, Any]) -> str:
    """Write the report for a person, headline first."""
    cost, crowd, goal = report["one_stream"], report["crowd"], report["target"]
    headline = f"HTTP adds {1e3 * cost['added_s']:.2f} ms to a token of {1e3 * cost['in_process_s']:.2f} ms at one stream"
    many = (
        f"{crowd['streams']} streams: {crowd['tokens_per_s']:.1f} tokens/s, most by fewest tokens {crowd['fairness']:.2f}, "
        f"slowest /health {1e3 * crowd['slowest_health_s']:.1f} ms"
    )
    target = f"goodput: answers with a first token in {goal['first_token_s']:g} s and {1e3 * goal['token_gap_s']:g} ms a token"
    return "\n".join([headline, many, "", table(lines_of(report), HEADERS), "", target])


def serving_page(report: Mapping[str, Any]) -> str:
    """Draw the report as a page: goodput, first tokens and gaps by the rate of arrivals."""
    rates = sorted({load["rate"] for load in report["loads"]})
    names = list(dict.fromkeys(load["server"] for load in report["loads"]))
    labels, axis = [f"{rate:g}" for rate in rates], "requests/s that come"

    def series(*path: str, factor: float = 1.0) -> list[Series]:
        found = []
        for name, style in zip(names, "abcd", strict=False):
            by_rate = {load["rate"]: load for load in report["loads"] if load["server"] == name}
            values: list[float | None] = []
            for rate in rates:
                value: Any = by_rate[rate]
                for key in path:
                    value = None if value is None else value[key]
                values.append(None if value is None else factor * value)
            found.append(Series(name, style, values))
        return found

    charts = [
        card("Goodput, answers/s", lines(labels, series("goodput_per_s"), axis, short), "Answers that kept the target."),
        card("Time to the first token, ms, p99", lines(labels, series("first_token_s", "p99", factor=1e3), axis, short), ""),
        card("Gap between tokens, ms, p99", lines(labels, series("token_gap_s", "p99", factor=1e3), axis, short), ""),
        card("Tokens/s of all answers", lines(labels, series("tokens_per_s"), axis, short), "Prefills and waiting included."),
    ]
    facts = escape(json.dumps(report.get("environment", {}), indent=1, ensure_ascii=False))
    body = [
        f'<h1>A server under load</h1>\n<p class="quiet">{escape(describe_serving(report).splitlines()[0])}</p>',
        f'<div class="grid">{"".join(charts)}</div>',
        f'<h2>In numbers</h2>\n<div class="card wide">{html_table(HEADERS, lines_of(report))}</div>',
        f'<details class="card"><summary>Environment</summary><pre>{facts}</pre></details>',
    ]
    return document("A server under load", body)
