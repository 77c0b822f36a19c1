"""Sections about several requests at a time. One whose report isn't there is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import exists, link, report, table

BENCH = {"slots-fp32": "fp32", "slots-int8": "8 bits"}
LONG = {"long-prompt-fp32": "fp32", "long-prompt-int8": "8 bits"}
PEERS = "peers-slots-amd-epyc"


def at_once() -> str:
    """Plain decoding, fixed rows and chosen rows, by requests at a time."""
    parts = [_load_table(name, precision) for name, precision in BENCH.items() if exists(name)]
    if not parts:
        return ""
    first = """## Several requests at a time

So many users ask at once, and each asks the next prompt when an answer has ended ([what the figures
mean](../benchmarks/README.md#bench---slots-several-requests-at-a-time))."""
    return "\n\n".join([first, *parts])


def _load_table(name: str, precision: str) -> str:
    found = report(name)
    rows = []
    for load in found["slots"]:
        for way, side in load.items():
            if way != "slots":
                rows.append((str(load["slots"]), _way(way), *_figures(side)))
    header = ("at a time", "", "tokens/s", "× plain", "of one request", "worst", "first token ms", "gap ms", "p99")
    equal = found["equal"]
    return f"""Tokens/s of all requests together, until the first user has nothing left to ask.
In {precision}, {found["prompts"]} prompts of at most {found["max_new_tokens"]} tokens, {found["repeats"]} times
({link(name)}); {equal["prompts"]} of {equal["of"]} answers were equal in all blocks:

{table(header, rows, texts=2)}"""


def _figures(side: Mapping[str, Any]) -> list[str]:
    rate, gap = side["request_tokens_per_s"], side["chunk_gap_s"]
    times = (side["first_token_s"]["p50"], gap["p50"], gap["p99"])
    rates = (f"{side['steady_tokens_per_s']:.1f}", f"{side['of_plain']:.2f}", f"{rate['median']:.1f}", f"{rate['worst']:.1f}")
    return [*rates, *(f"{1e3 * seconds:.0f}" for seconds in times)]


def long_prompts() -> str:
    """Gaps of streams while a long prompt is read."""
    names = [name for name in LONG if exists(name)]
    if not names:
        return ""
    rows = []
    for name in names:
        for way, side in report(name)["ways"].items():
            gaps = (side["before"]["chunk_gap_s"], side["during"]["chunk_gap_s"])
            times = [gap[share] for gap in gaps for share in ("p50", "p99")] + [side["limit_s"], side["first_token_s"]]
            rows.append((LONG[name], _way(way), *(f"{1e3 * seconds:.0f}" for seconds in times), "yes" if side["met"] else "no"))
    found = report(names[0])
    header = ("", "", "gap before, ms", "p99", "gap during", "p99", "limit", "its first token", "p99 within limit")
    return f"""## A long prompt among streams

A prompt of {found["long_prompt"]} tokens arrives while {found["streams"]} answers stream, {found["repeats"]} times
({", ".join(link(name, LONG[name]) for name in names)}). Limit: one of its chunks of {found["prefill_chunk"]} tokens, and two
gaps of before. Sessions with several slots compute at most 128 rows of a prompt in a step:

{table(header, rows, texts=2)}"""


def beside() -> str:
    """Other engines with several prompts at a time."""
    if not exists(PEERS):
        return ""
    found = report(PEERS)
    settings, loads = found["settings"], found["slots"]
    rows = []
    for name, entry in loads[0]["systems"].items():
        entries = [load["systems"][name] for load in loads]
        if all(each["status"] == "measured" for each in entries):
            package, version = next(iter(entry["versions"].items()))
            cells = [cell for load, each in zip(loads, entries, strict=True) for cell in _peer_cells(load, each)]
            rows.append((entry["label"], f"{package} {version}", *cells))
    header = [head for load in loads for head in (f"{load['slots']} at a time, tokens/s", "× best peer", "same output")]
    length = "exactly" if settings["ignore_eos"] else "at most"
    return f"""## Beside other engines, several prompts at a time

{settings["prompts"]} prompts, {length} {settings["max_new_tokens"]} tokens, {settings["threads"]} threads, greedy, in one run
({link(PEERS)}, [method](../benchmarks/README.md#several-prompts-at-a-time)). The rate is of all prompts, prefills included. The
best peer is that of the same precision; so is the plain decoding whose tokens count as the same output:

{table(("", "package", *header), rows, texts=2)}"""


def _peer_cells(load: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, str, str]:
    best = load["best"].get(entry["precision"])
    share = f"{entry['tokens_per_s'] / load['systems'][best['peer']]['tokens_per_s']:.2f}" if best else ""
    same = entry["agreement"]
    return f"{entry['tokens_per_s']:.1f}", share, f"{same['identical']} of {same['prompts']}" if same else ""


def _way(name: str) -> str:
    return {"plain": "plain", "chosen": "rows chosen in each step"}.get(name, f"{name.removeprefix('rows_')} rows in every step")
