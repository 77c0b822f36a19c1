"""The section about model sizes, and the README's table: reports that ``model_sizes.py`` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import markdown
from .markdown import link, table, wrapped

Report = Mapping[str, Any]
Stages = dict[int, tuple[str, Report]]
PRECISIONS = {"fp32": "fp32", "int8": "8 bits", "int4": "4 bits"}
_WAYS = {"heads_only": "", "medusa": " + prompt lookup"}


def models() -> dict[str, dict[str, Stages]]:
    """Names and reports by model, precision and stage of Medusa. Models are in the order of their size."""
    found: dict[str, dict[str, Stages]] = {}
    for path in sorted(markdown.RESULTS.glob("*-medusa-[12]-*.json")):
        report = markdown.report(path.stem)
        found.setdefault(report["label"], {}).setdefault(report["precision"], {})[report["stage"]] = path.stem, report
    return dict(sorted(found.items(), key=lambda model: -_first(model[1]["fp32"])["plain"]["tokens_per_s"]))


def section() -> str:
    """Every model, precision and way beside plain decoding, and the speed-ups by category."""
    measured = models()
    first = _first(next(iter(measured.values()))["fp32"])
    runs = [
        (model, name, precisions[name]) for model, precisions in measured.items() for name in PRECISIONS if name in precisions
    ]
    rows = [row for run in runs for row in _ways(*run)]
    links = [
        link(name, f"{model}, Medusa-{stage}, {PRECISIONS[how]}")
        for model, how, stages in runs
        for stage, (name, _) in stages.items()
    ]
    header = ("", "precision", "", "tokens/s", "speed-up", "tokens a step", "cost of a step", "outputs as plain's")
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

{_categories(measured)}"""


def readme_table() -> str:
    """Tokens/s by model and precision, with speed-ups; and how they were measured."""
    measured = models()
    rows, first = [], _first(next(iter(measured.values()))["fp32"])
    for model, precisions in measured.items():
        for name, words in PRECISIONS.items():
            if stages := precisions.get(name):
                cells = [_cell(stages[stage][1]["medusa"]) if stage in stages else "–" for stage in (1, 2)]
                rows.append((f"{model}, {words}", f"{_first(stages)['plain']['tokens_per_s']:.1f}", *cells))
    environment = first["environment"]
    return wrapped(f"""{table(("tokens/s", "plain", "Medusa-1", "Medusa-2"), rows)}

With prompt lookup, greedy, {first["prompts"]} held-out prompts of at most {first["max_new_tokens"]} new tokens,
{environment["cores"]} cores of an {environment["cpu"]}; all columns of a model in one run. fp32: 32-bit floats.""")


def _first(stages: Stages) -> Report:
    return stages[min(stages)][1]


def _cell(way: Report) -> str:
    return f"{way['tokens_per_s']:.1f} ({way['speedup']:.2f}×)"


def _ways(model: str, precision: str, stages: Stages) -> Iterator[tuple[str, ...]]:
    for number, (_, report) in sorted(stages.items()):
        if number == min(stages):
            yield model, PRECISIONS[precision], "plain", f"{report['plain']['tokens_per_s']:.1f}", "1.00×", "1.00", "1.00", ""
        same = f"{report['equal']['prompts']} of {report['equal']['of']}"
        for way, words in _WAYS.items():
            found = report[way]
            length = found["mean_acceptance_length"]
            cost = f"{length / found['speedup']:.2f}"
            figures = f"{found['tokens_per_s']:.1f}", f"{found['speedup']:.2f}×", f"{length:.2f}", cost
            yield model, PRECISIONS[precision], f"Medusa-{number}{words}", *figures, same


def _categories(measured: Mapping[str, Mapping[str, Stages]]) -> str:
    columns = [
        (f"{model}, Medusa-{stage}", report["by_category"])
        for model, precisions in measured.items()
        for stage, (_, report) in sorted(precisions["fp32"].items())
    ]
    rows = [
        (category, *(f"{found[category]['medusa_speedup']:.2f}×" if category in found else "–" for _, found in columns))
        for category in sorted({category for _, found in columns for category in found})
    ]
    return table(("", *(name for name, _ in columns)), rows)
