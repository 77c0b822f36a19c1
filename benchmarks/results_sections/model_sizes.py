"""The section about model sizes, and the README's table: reports that ``model_sizes.py`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_deploy.tools.figure.data import Bar, Group, figure_data, precision

from . import markdown
from .markdown import link, table, wrapped

Report = Mapping[str, Any]


def section() -> str:
    """Every model, precision and way beside plain decoding, and the speed-ups by category."""
    reports = _reports()
    first, equal = next(iter(reports.values())), {_of(found): found["equal"] for found in reports.values()}
    rows = [_row(group, bar, equal) for group in figure_data(reports).groups for bar in group.bars]
    header = ("", "precision", "", "tokens/s", "speed-up", "tokens a step", "cost of a step", "outputs as plain's")
    links = [link(path.stem, f"{found['label']}, Medusa-{found['stage']}, {precision(found)}") for path, found in reports.items()]
    return f"""## Model sizes

{first["environment"]["cores"]} cores of an {first["environment"]["cpu"]}, greedy, {first["prompts"]} held-out prompts of eight
categories, at most {first["max_new_tokens"]} tokens, batch 1. All rows of a model are of one run, whose ways took turns prompt by
prompt (`benchmarks/model_sizes.py`; `make figure` draws them):

{table(header, rows, texts=3)}

- tokens/s: the tokens of all prompts ÷ their decoding time, without prefill. A speed-up divides by plain decoding of the same
  precision. Plain decoding leaves the heads out.
- cost of a step: in plain steps, on average over the rows that were chosen.
- Reports: {", ".join(links)}.

Speed-ups with prompt lookup in fp32, by category:

{_categories([found for found in reports.values() if precision(found) == "fp32"])}"""


def readme_table() -> str:
    """Tokens/s by model and precision, with speed-ups; and how they were measured."""
    reports = _reports()
    first, rows = next(iter(reports.values())), []
    for group in figure_data(reports).groups:
        cells = {bar.stage: f"{bar.tokens_per_s:.1f} ({bar.speedup:.2f}×)" for bar in group.bars if bar.lookup}
        plain = f"{group.bars[0].tokens_per_s:.1f}"
        rows.append((f"{group.model}, {group.precision}", plain, *(cells.get(stage, "–") for stage in (1, 2))))
    environment = first["environment"]
    return wrapped(f"""{table(("tokens/s", "plain", "Medusa-1", "Medusa-2"), rows)}

With prompt lookup, greedy, {first["prompts"]} held-out prompts of at most {first["max_new_tokens"]} new tokens,
{environment["cores"]} cores of an {environment["cpu"]}; all columns of a model in one run. fp32: 32-bit floats.""")


def _reports() -> dict[Path, Report]:
    """The reports by file: models in the order of their size, that is of plain decoding in fp32."""
    found = {path: markdown.report(path.stem) for path in sorted(markdown.RESULTS.glob("*-medusa-[12]-*.json"))}
    rates = {each["label"]: each["plain"]["tokens_per_s"] for each in found.values() if precision(each) == "fp32"}
    return dict(sorted(found.items(), key=lambda each: -rates[each[1]["label"]]))


def _of(report: Report) -> tuple[str, str, int]:
    return report["label"], precision(report), report["stage"]


def _row(group: Group, bar: Bar, equal: Mapping[tuple[str, str, int], Report]) -> tuple[str, ...]:
    figures = f"{bar.tokens_per_s:.1f}", f"{bar.speedup:.2f}×", f"{bar.tokens:.2f}", f"{bar.cost:.2f}"
    if not bar.stage:
        return group.model, group.precision, "plain", *figures, ""
    same = equal[group.model, group.precision, bar.stage]
    return group.model, group.precision, bar.label, *figures, f"{same['prompts']} of {same['of']}"


def _categories(reports: list[Report]) -> str:
    columns = [(f"{found['label']}, Medusa-{found['stage']}", found["by_category"]) for found in reports]
    rows = [
        (category, *(f"{found[category]['medusa_speedup']:.2f}×" if category in found else "–" for _, found in columns))
        for category in sorted({category for _, found in columns for category in found})
    ]
    return table(("", *(name for name, _ in columns)), rows)
