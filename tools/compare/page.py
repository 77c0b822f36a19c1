"""Draws the report of ``compare`` as one HTML page, light or dark as the reader's system is.

The page has no script and needs no other file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..console import human_bytes
from ..page.document import card, document, table
from ..page.svg_chart import Series, bars, lines, percent, short
from .table import check_words, rows, side_name, unexplained

_LONGEST_PROMPT = 400


def page(report: Mapping[str, Any]) -> str:
    """Draw the whole page. Everything that comes from a model, a prompt or a bundle is escaped."""
    names = {side: side_name(report, side) for side in ("a", "b")}
    title = f"{names['b']} against {names['a']}"
    body = [
        _verdict(report, names),
        f'<h2>In numbers</h2>\n<div class="card wide">{table(["", "A", "B", "B against A"], rows(report))}</div>',
        _divergences(report),
        f'<h2>In pictures</h2>\n<div class="grid">{"".join(_charts(report))}</div>',
        f"<h2>Greedy answers side by side</h2>\n{_examples(report['greedy'])}",
        _details(report),
    ]
    return document(title, body)


def _verdict(report: Mapping[str, Any], names: Mapping[str, str]) -> str:
    verdict = report["verdict"]
    checks = []
    for check in verdict["checks"]:
        found, limit = check_words(check)
        mark, kind = ("✓", "pass") if check["passed"] else ("✗", "fail")
        checks.append(f'<li class="{kind}"><b>{mark}</b> {escape(found)} <span class="quiet">{escape(limit)}</span></li>')
    passed = verdict["passed"]
    sides = "".join(f"<p>{side.upper()}: {escape(name)}</p>" for side, name in names.items())
    measured = f"{report['prompts']} prompts, up to {report['max_new_tokens']} tokens each; {report['environment']['date']}"
    return (
        f'<div class="card verdict{" pass" if passed else ""}">\n'
        f"<h1><strong>{'Pass' if passed else 'Fail'}</strong>: B is {'within' if passed else 'over'} its budget</h1>\n"
        f'<ul>{"".join(checks)}</ul>\n{sides}<p class="quiet">{escape(measured)}</p>\n</div>'
    )


def _divergences(report: Mapping[str, Any]) -> str:
    told = "".join(f"<p>{escape(line)}</p>" for line in unexplained(report))
    return f'<h2>Divergences from its own plain decoding</h2>\n<div class="card">{told}</div>' if told else ""


def _charts(report: Mapping[str, Any]) -> list[str]:
    """Charts of the report, one card each."""
    texts = {name: report[name] for name in ("answers", "prose") if report[name] is not None}
    answers, heads, acceptance, layers = (report[name] for name in ("answers", "heads", "acceptance", "layers"))
    kl = answers["kl_nats"]
    found = [
        card(
            "How far B's predictions are from A's",
            bars(
                _between(kl["histogram"]["edges"]),
                [
                    Series(name, style, _shares(texts[name]["kl_nats"]["histogram"]["counts"]))
                    for name, style in (("answers", "c"), ("prose", "d"))
                    if name in texts
                ],
                "KL(A‖B) of a position, nats",
                percent,
            ),
            f"Share of positions. On A's answers: mean {kl['mean']:.2g}, 99th percentile {kl['p99']:.2g} nats.",
        ),
        card("Same token, by position in the answer", *_agreement(report)),
        card("Are disagreements near ties?", *_margins(answers)),
    ]
    shown = [str(layer) for layer in range(len(layers["median"]))]
    missing = layers["not_comparable"]
    if len(missing) < len(shown):
        series = [Series("median position", "c", layers["median"]), Series("all, root mean square", "d", layers["relative_rms"])]
        note = f" Not comparable: {', '.join(map(str, missing))}." if missing else ""
        drawn = lines(shown, series, "layer", short)
    else:
        drawn, note = "<p>No layer is comparable: the graphs don't share their layers.</p>", ""
    told = "Error of a layer's output relative to its size, on the same tokens; a few huge positions decide the root mean square."
    found.append(card("Where the error comes from", drawn, told + note))
    series = [
        Series(f"{side.upper()}, {words}", f"{side}{soft}", heads[side][rank])
        for rank, words, soft in (("top1", "first candidate", ""), ("top5", "first five", " soft"))
        for side in ("a", "b")
    ]
    told = f"At the same {heads['positions']} positions of A's answers, {heads['left_out']} left out: a side chose another token."
    numbers = [str(1 + head) for head in range(max(len(heads[side]["top1"]) for side in ("a", "b")))]
    padded = [each._replace(values=[*each.values, *[None] * (len(numbers) - len(each.values))]) for each in series]
    found.append(card("How often heads are right", bars(numbers, padded, "head", percent), told))
    accepted = {side: _shares(acceptance[side]["histogram"]) for side in ("a", "b")}
    numbers = [str(count) for count in range(max(map(len, accepted.values())))]
    series = [
        Series(f"{side.upper()}, {acceptance[side]['mean_acceptance_length']:.2f} tokens a step", side, _padded(shares, numbers))
        for side, shares in accepted.items()
    ]
    told = f"Share of steps. {report['rows']} rows in every step, of the heads alone."
    found.append(card("What a step accepts", bars(numbers, series, "drafted tokens accepted", percent), told))
    return found


def _padded(values: Sequence[float], labels: Sequence[str]) -> list[float]:
    return [*values, *[0.0] * (len(labels) - len(values))]


def _agreement(report: Mapping[str, Any]) -> tuple[str, str]:
    """Teacher-forced and free-running agreement, in the same bins."""
    bins, greedy = report["answers"]["by_position"], report["greedy"]
    free: list[float | None] = [greedy["same_after"][each["to"] - 1] for each in bins]
    series = [Series("argmax, both reading A's answer", "c", [each["share"] for each in bins])]
    series.append(Series("answers the same so far, each side its own", "d", free))
    prefix = greedy["common_prefix"]
    told = (
        f"{greedy['identical']} of {greedy['answers']} answers are identical; the common prefix is {prefix['median']:g} tokens "
        f"in the median, {prefix['mean']:.1f} on average."
    )
    return lines([str(each["to"]) for each in bins], series, "tokens", percent, most=1.0), told


def _margins(answers: Mapping[str, Any]) -> tuple[str, str]:
    margins, count = answers["margin_nats"], answers["argmax_agreement"]["disagreeing"]
    if not count:
        return "<p>The argmax is the same at every position.</p>", f"{answers['positions']} positions of A's answers."
    histogram = margins["histogram"]
    series = [
        Series(f"where they {words}", style, _shares(histogram[kind]))
        for kind, words, style in (("disagreeing", "disagree", "b"), ("agreeing", "agree", "a soft"))
    ]
    told = f"{count} of {answers['positions']} positions disagree; there A's margin is {margins['disagreeing']['median']:.2g} "
    drawn = bars(_between(histogram["edges"]), series, "A's best token ahead of its second, nats", percent)
    return drawn, f"{told}nats in the median, and at most {margins['disagreeing']['largest']:.2g}."


def _between(edges: Sequence[float]) -> list[str]:
    """Labels of a histogram's bins: one below the first edge, and one from each edge on."""
    return [f"<{_edge(edges[0])}", *(_edge(edge) for edge in edges)]


def _edge(edge: float) -> str:
    return f"{edge:g}" if edge >= 1e-3 else f"{edge:.0e}".replace("e-0", "e-")


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]


def _examples(greedy: Mapping[str, Any]) -> str:
    cards = []
    for example in greedy["examples"]:
        prompt = example["prompt"]
        prompt = f"…{prompt[-_LONGEST_PROMPT:]}" if len(prompt) > _LONGEST_PROMPT else prompt
        pairs = enumerate(zip(example["a"], example["b"], strict=False))
        same = next((index for index, (one, other) in pairs if one != other), min(len(example["a"]), len(example["b"])))
        answers = [example["a"]] if example["a"] == example["b"] else [example["a"], example["b"]]
        sides = ["A and B"] if len(answers) == 1 else ["A", "B"]
        quotes = [
            f'<div><h3>{side}</h3><blockquote><span class="same">{escape(answer[:same])}</span>'
            f"<mark>{escape(answer[same:])}</mark></blockquote></div>"
            for side, answer in zip(sides, answers, strict=True)
        ]
        cards.append(
            f'<section class="card"><blockquote class="quiet">{escape(prompt)}</blockquote>'
            f'<div class="grid">{"".join(quotes)}</div>'
            f'<p class="quiet">tokens in common: {example["common_tokens"]}</p></section>'
        )
    return '<div style="display:grid;gap:12px">' + "\n".join(cards) + "</div>"


def _details(report: Mapping[str, Any]) -> str:
    files = [
        [side.upper(), name, human_bytes(size)] for side in ("a", "b") for name, size in report["size"][side]["files"].items()
    ]
    facts = json.dumps(report["environment"], indent=1, ensure_ascii=False)
    told = "Files of weights are shared by the graphs of a bundle; the table above counts what each graph reads of them."
    return (
        f'<details class="card"><summary>Files and environment</summary>\n<div class="wide">{table(["", "file", "size"], files)}'
        f'</div>\n<p class="quiet">{told}</p>\n<pre>{escape(facts)}</pre></details>'
    )
