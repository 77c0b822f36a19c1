"""Turns blocks of answers into the report of ``bench --slots``, and the report into text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from ...runtime.errors import UsageError
from ..console import table
from .users import Answer, Block

HEADERS = (
    *("at a time", "way", "tokens/s", "steady", "of plain", "per request", "worst", "first token ms", "p99"),
    *("chunk gap ms", "p99", "token gap ms", "p99", "tokens a chunk", "rows a step"),
)


def summarise(blocks: Mapping[int, Mapping[str, Sequence[Block]]]) -> dict[str, Any]:
    """Summarise the blocks [slots][way][repeat]; ``plain`` is among the ways.

    Raises:
        UsageError: every answer ended at its first chunk.
    """
    texts: dict[int, set[tuple[int, ...]]] = {}
    for ways in blocks.values():
        for answer in (answer for repeats in ways.values() for block in repeats for answer in block.answers):
            texts.setdefault(answer.prompt, set()).add(tuple(answer.tokens))
    different = sorted(prompt for prompt, found in texts.items() if len(found) > 1)
    loads = []
    for slots, ways in blocks.items():
        sides = {name: _side(repeats) for name, repeats in ways.items()}
        for side in sides.values():
            side["of_plain"] = side["steady_tokens_per_s"] / sides["plain"]["steady_tokens_per_s"]
        loads.append({"slots": slots, **sides})
    return {"slots": loads, "equal": {"prompts": len(texts) - len(different), "of": len(texts), "different": different}}


def _side(blocks: Sequence[Block]) -> dict[str, Any]:
    """Numbers of one way at one number of requests. ``host_fraction``: the share of the time that the engine didn't take."""
    answers = [answer for block in blocks for answer in block.answers]
    rates = [rate for answer in answers if (rate := answer.tokens_per_s) is not None]
    if not rates:
        raise UsageError("every answer ended at its first chunk: there are no gaps to measure", hint="give other prompts")
    steps = sum(answer.stats.steps for answer in answers)
    drafted = sum(count * steps for answer in answers for count, steps in answer.stats.accepted.items())
    return {
        "tokens_per_s": median(block.tokens_per_s for block in blocks),
        "steady_tokens_per_s": median(block.steady_tokens_per_s for block in blocks),
        "request_tokens_per_s": {"median": median(rates), "worst": min(rates)},
        "first_token_s": quantiles(answer.first_token_seconds for answer in answers),
        **gaps([(gap, size) for answer in answers for _, gap, size in chunks_after_first(answer)]),
        "rows": sum(answer.stats.rows for answer in answers) / max(1, steps),
        "mean_acceptance_length": 1 + drafted / max(1, steps),
        "host_fraction": 1 - sum(block.engine_seconds for block in blocks) / sum(block.seconds for block in blocks),
        "seconds": [block.seconds for block in blocks],
    }


def chunks_after_first(answer: Answer) -> list[tuple[float, float, int]]:
    """Arrival, gap before it, and tokens of every chunk but the first."""
    pairs = zip(answer.arrivals, answer.arrivals[1:], answer.sizes[1:], strict=False)
    return [(after, after - before, size) for before, after, size in pairs]


def gaps(found: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Quantiles of (gap, tokens) by chunk and by token: a chunk of k tokens counts k times, each a k-th of its gap."""
    return {
        "chunk_gap_s": quantiles(gap for gap, _ in found),
        "token_gap_s": quantiles(gap / size for gap, size in found for _ in range(size)),
        "tokens_per_chunk": fmean(size for _, size in found),
    }


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """The median and the 99th percentile: the smallest value that at least 99 % of them don't exceed."""
    found = sorted(values)
    return {f"p{share}": found[math.ceil(share / 100 * len(found)) - 1] for share in (50, 99)}


def lines_of(report: Mapping[str, Any]) -> list[list[str]]:
    """The report's table, a line for each way at each number of requests, under ``HEADERS``."""
    sides = [(load["slots"], name, side) for load in report["slots"] for name, side in load.items() if name != "slots"]
    return [[str(slots), title(name), *_cells(side)] for slots, name, side in sides]


def title(way: str) -> str:
    """Name a way as a person would."""
    return {"plain": "plain", "chosen": "rows chosen"}.get(way, f"{way.removeprefix('rows_')} rows")


def _cells(side: Mapping[str, Any]) -> list[str]:
    rate = side["request_tokens_per_s"]
    times = [side[name][share] for name in ("first_token_s", "chunk_gap_s", "token_gap_s") for share in ("p50", "p99")]
    return [
        *(f"{side[name]:.1f}" for name in ("tokens_per_s", "steady_tokens_per_s")),
        *(f"{side['of_plain']:.2f}×", f"{rate['median']:.1f}", f"{rate['worst']:.1f}"),
        *(f"{1e3 * seconds:.1f}" for seconds in times),
        *(f"{side['tokens_per_chunk']:.2f}", f"{side['rows']:.1f}"),
    ]


def describe(report: Mapping[str, Any]) -> str:
    """Write the report for a person, headline first."""
    most, equal = report["slots"][-1], report["equal"]
    headline = (
        f"{most['chosen']['steady_tokens_per_s']:.1f} tokens/s with rows chosen, "
        f"{most['plain']['steady_tokens_per_s']:.1f} plain: {most['chosen']['of_plain']:.2f}× with {most['slots']} at a time"
    )
    lines = [headline, "", table(lines_of(report), HEADERS), "", f"equal output: {equal['prompts']}/{equal['of']} prompts"]
    if equal["different"]:
        numbers = ", ".join(str(index + 1) for index in equal["different"])
        known = ("medusa-deploy verify says whether rounding explains it", "the graph rounds to 8 bits")
        lines.append(f"DIFFERENT output for prompt {numbers}: {known[report['rounds_activations']]}")
    return "\n".join(lines)
