"""Writes the report of ``compare`` as one table, for a terminal and for the head of its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..console import human_bytes, table
from ..exactness.first_divergence import describe_divergence

_MOST_DIVERGENCES = 3
_TEXTS = {"answers": "A's answers", "prose": "held-out prose"}
_CHECKS = {
    "perplexity_increase_percent": ("perplexity {value:+.2f} %", "at most {limit:+g} %"),
    "acceptance_ratio": ("acceptance {value:.3f} of A's", "at least {limit:g}"),
    "unexplained_divergences": ("{value} unexplained divergences", "none"),
}


class Row(NamedTuple):
    """One figure of both sides and its change, as text."""

    name: str
    a: str
    b: str
    change: str


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The report's main figures."""
    lines = [line for name, title in _TEXTS.items() if report[name] is not None for line in _read(report[name], title)]
    greedy, heads, acceptance, exactness = (report[name] for name in ("greedy", "heads", "acceptance", "exactness"))
    speed, size = report["speed"], report["size"]
    identical = f"{greedy['identical']} of {greedy['answers']}"
    prefix = greedy["common_prefix"]
    lines.append(Row("identical greedy answers", "", "", identical))
    lines.append(Row("greedy answers agree for", "", "", f"median {prefix['median']:g}, mean {prefix['mean']:.1f} tokens"))
    for rank, title in (("top1", "first candidate"), ("top5", "first five")):
        a, b = heads["a"][rank][0], heads["b"][rank][0]
        lines.append(Row(f"head 1 right, {title}", f"{a:.1%}", f"{b:.1%}", f"{100 * (b - a):+.1f} points"))
    a, b = (acceptance[side]["mean_acceptance_length"] for side in ("a", "b"))
    lines.append(Row(f"mean acceptance length, {report['rows']} rows", f"{a:.3f}", f"{b:.3f}", f"{acceptance['ratio'] - 1:+.2%}"))
    lines.append(Row("its change, 95 % interval", "", "", " … ".join(f"{ratio - 1:+.1%}" for ratio in acceptance["ratio_95"])))
    lines.append(Row("unexplained divergences", str(exactness["a"]["unexplained"]), str(exactness["b"]["unexplained"]), ""))
    lines.append(Row("error of the last layer's output", "", "", layer_error(report["layers"])))
    for way, title in (("plain", "plain"), ("medusa", "Medusa")):
        a, b = (speed[side][way]["tokens_per_s"] for side in ("a", "b"))
        lines.append(Row(f"tokens/s, {title}", f"{a:.1f}", f"{b:.1f}", f"{speed[f'{way}_ratio'] - 1:+.1%}"))
    a, b = (size[side]["bytes"] for side in ("a", "b"))
    lines.append(Row("graph and weights", human_bytes(a), human_bytes(b), f"{size['ratio'] - 1:+.1%}"))
    return lines


def _read(part: Mapping[str, Any], title: str) -> list[Row]:
    perplexity, kl, argmax = part["perplexity"], part["kl_nats"], part["argmax_agreement"]
    a, b = perplexity["a"], perplexity["b"]
    return [
        Row(f"perplexity, {title}", f"{a:.4f}", f"{b:.4f}", f"{perplexity['increase_percent']:+.2f} %"),
        Row(f"KL(A‖B), {title}", "", "", f"mean {kl['mean']:.2g}, p99 {kl['p99']:.2g} nats"),
        Row(f"same argmax, {title}", "", "", f"{argmax['share']:.2%} of {part['positions']}"),
    ]


def layer_error(layers: Mapping[str, Any]) -> str:
    """Relative error of the last layer that can be compared."""
    known = [error for error in layers["median"] if error is not None]
    return f"median {known[-1]:.2g}" if known else "not comparable"


def headline(report: Mapping[str, Any]) -> str:
    """Say that the report is within the budget or over it, and by what."""
    verdict = report["verdict"]
    over = [check for check in verdict["checks"] if not check["passed"]]
    told = [" ".join(check_words(check)) for check in over or verdict["checks"]]
    return f"{'within budget' if verdict['passed'] else 'OVER BUDGET'}: {'; '.join(told)}"


def check_words(check: Mapping[str, Any]) -> tuple[str, str]:
    """Finding of one check of the verdict, and its limit in brackets."""
    found, limit = _CHECKS[check["name"]]
    return found.format(**check), f"({limit.format(**check)})"


def side_name(report: Mapping[str, Any], side: str) -> str:
    """Bundle, variant and type of one side."""
    facts = report["environment"][side]
    return f"{facts['name']}, {facts['variant']}, {facts['dtype']}"


def unexplained(report: Mapping[str, Any]) -> list[str]:
    """Describe B's first divergences from its own plain decoding that rounding doesn't explain, and what they mean."""
    exactness = report["exactness"]["b"]
    ways = {"fixed_rows": f"B with {report['rows']} rows", "medusa": "B, Medusa"}
    entries = [(title, found) for way, title in ways.items() for found in exactness[way]["first_divergences"]]
    wrong = [(title, found) for title, found in entries if not found["explained"]]
    if not wrong:
        return []
    told = [describe_divergence(title, found) for title, found in wrong[:_MOST_DIVERGENCES]]
    if len(wrong) > len(told):
        told.append(f"and {len(wrong) - len(told)} more")
    if any(found["noise"] > found["limit"] for _, found in wrong):
        told.append(
            "Noise over the limit: B's graph computes a row alone otherwise than among others, by more than rounding. "
            "Activations that are quantised when it runs do that."
        )
    return told


def describe(report: Mapping[str, Any]) -> str:
    """Write the report for a terminal: the verdict, then the table."""
    lines = [headline(report), *(f"{side.upper()}: {side_name(report, side)}" for side in ("a", "b")), ""]
    lines.append(table(rows(report), ["", "A", "B", "B against A"]))
    lines += unexplained(report)
    missing = report["layers"]["not_comparable"]
    if missing:
        lines.append(f"layers that can't be compared: {', '.join(map(str, missing))}")
    return "\n".join(lines)
