"""Turns timed runs into the report of ``bench``, and the report into text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ...runtime.errors import UsageError
from ..console import table
from .row_sweep import describe_sweep
from .timed_run import TimedRun

_TITLES = {
    "plain": "plain",
    "medusa": "Medusa",
    "best_rows": "rows chosen by the host",
    "heads_only": "without lookup",
    "fixed_tree": "on a fixed tree",
    "typical": "typical acceptance, lossy",
}
_LOSSY = ("typical",)


def summarise(runs: Mapping[str, Sequence[Sequence[TimedRun]]]) -> dict[str, Any]:
    """Summarise the runs [prompt][repeat] of each way; ``plain`` and ``medusa`` are among them.

    Raises:
        UsageError: no prompt led to a decode step.
    """
    by_prompt = [[run for repeats in of_prompt for run in repeats] for of_prompt in zip(*runs.values(), strict=True)]
    measured = [index for index, flat in enumerate(by_prompt) if all(run.step_seconds for run in flat)]
    if not measured:
        raise UsageError("every prompt ended at its first token: there is no decoding to measure", hint="give other prompts")
    kept = {name: [each[index] for index in measured] for name, each in runs.items()}
    each = [{"prompt": index, **_one_prompt({name: kept[name][at] for name in kept})} for at, index in enumerate(measured)]
    exact = [each for name, each in runs.items() if name not in _LOSSY]
    texts = [{tuple(run.tokens) for repeats in of_prompt for run in repeats} for of_prompt in zip(*exact, strict=True)]
    different = [index for index, found in enumerate(texts) if len(found) > 1]
    sides = {name: _side(of_prompt) for name, of_prompt in kept.items()}
    for name in sides.keys() - {"plain"}:
        sides[name] |= {
            "speedup": sides[name]["tokens_per_s"] / sides["plain"]["tokens_per_s"],
            "median_speedup": median(prompt[f"{name}_speedup"] for prompt in each),
            "overhead": sides[name]["ms_per_step"] / sides["plain"]["ms_per_step"],
            **_acceptance(kept[name]),
            **_choice(kept[name]),
        }
    return {
        **sides,
        **{key: sides["medusa"][key] for key in ("speedup", "median_speedup", "overhead", "host_fraction")},
        "equal": {"prompts": len(by_prompt) - len(different), "of": len(by_prompt), "different": different},
        "per_prompt": each,
    }


def _acceptance(runs: Sequence[Sequence[TimedRun]]) -> dict[str, Any]:
    steps: Counter[int] = Counter()
    for repeats in runs:
        for run in repeats:
            steps.update(run.accepted)
    histogram = [steps[count] for count in range(max(steps) + 1)]
    drafted = sum(count * steps for count, steps in enumerate(histogram))
    return {"mean_acceptance_length": 1 + drafted / sum(histogram), "accepted_histogram": histogram}


def _choice(runs: Sequence[Sequence[TimedRun]]) -> dict[str, Any]:
    """Numbers of rows that the steps had, and the reasons where they were chosen."""
    flat = [run for repeats in runs for run in repeats if run.choice]
    if not flat:
        return {}
    steps: Counter[int] = Counter()
    for run in flat:
        steps.update(run.choice["rows_histogram"])
    histogram = [steps[rows] for rows in range(max(steps) + 1)]
    return {
        "rows": sum(rows * count for rows, count in enumerate(histogram)) / sum(histogram),
        "rows_histogram": histogram,
        **{name: sum(run.choice[name] for run in flat) for name in ("plain_steps", "probes")},
        **{name: flat[-1].choice[name] for name in ("trust", "costs") if flat[-1].choice[name] is not None},
    }


def _one_prompt(runs: Mapping[str, Sequence[TimedRun]]) -> dict[str, Any]:
    """Rates of one prompt, by way."""
    plain, medusa = runs["plain"][0], runs["medusa"][0]
    rates = {name: median(run.decoded / run.decode_seconds for run in repeats) for name, repeats in runs.items()}
    return {
        "tokens": len(plain.tokens),
        **{f"{name}_tokens_per_s": rate for name, rate in rates.items()},
        **{f"{name}_speedup": rates[name] / rates["plain"] for name in rates if name != "plain"},
        "tokens_per_step": medusa.decoded / len(medusa.step_seconds),
    }


def _side(runs: Sequence[Sequence[TimedRun]]) -> dict[str, Any]:
    """Numbers of one way. ``host_fraction`` is the share of the decoding wall time that the engine didn't take."""
    flat = [run for repeats in runs for run in repeats]
    decoding = sum(median(run.decode_seconds for run in repeats) for repeats in runs)
    prefill = sum(median(run.prefill_seconds for run in repeats) for repeats in runs)
    decoded = sum(repeats[0].decoded for repeats in runs)
    return {
        "tokens_per_s": decoded / decoding,
        "tokens_per_s_with_prefill": (decoded + len(runs)) / (decoding + prefill),
        "ms_per_step": 1e3 * median(seconds for run in flat for seconds in run.step_seconds),
        "steps": sum(len(run.step_seconds) for run in flat),
        "prefill_ms": 1e3 * median(run.prefill_seconds for run in flat),
        "host_fraction": 1 - sum(run.engine_seconds for run in flat) / sum(run.decode_seconds for run in flat),
    }


def describe(report: Mapping[str, Any]) -> str:
    """Write the report for a person, headline first."""
    plain, medusa, equal = report["plain"], report["medusa"], report["equal"]
    how = f", sampled at temperature {report['temperature']:g}" if "temperature" in report else ""
    headline = (
        f"{medusa['tokens_per_s']:.1f} tokens/s with Medusa, {plain['tokens_per_s']:.1f} plain: {report['speedup']:.2f}× "
        f"over {len(report['per_prompt'])} prompts (median prompt {report['median_speedup']:.2f}×){how}"
    )
    fixed = {name: f"{name.removeprefix('rows_')} rows in every step" for name in report if name.startswith("rows_")}
    rows = [_row(title, report[name]) for name, title in {**_TITLES, **fixed}.items() if name in report]
    headers = ["", "tokens/s", "speed-up", "mean acceptance length", "rows a step", "ms a step", "overhead", "outside the engine"]
    lines = [headline, "", table(rows, headers), ""]
    lines.append(f"steps by drafted tokens accepted (0, 1, …): {medusa['accepted_histogram']}")
    if "costs" in medusa:
        counts = f"{medusa['plain_steps']} plain, {medusa['probes']} probes"
        lines.append(f"steps by rows (0, 1, …): {medusa['rows_histogram']}; {counts}")
        lines.append(f"cost of a step against a plain one: {', '.join(f'{k} {v:.2f}' for k, v in medusa['costs'].items())}")
        lines.append(f"trust in each head, and in lookup: {', '.join(f'{trust:.2f}' for trust in medusa['trust'])}")
    if report["bandwidth_gb_s"] is not None:
        lines.append(f"weights read by plain steps: {report['bandwidth_gb_s']:.1f} GB/s")
    lines.append(f"equal output: {equal['prompts']}/{equal['of']} prompts")
    if equal["different"]:
        numbers = ", ".join(str(index + 1) for index in equal["different"])
        known = (
            "the graph rounds to 8 bits"
            if report.get("rounds_activations")
            else "medusa-deploy verify says whether rounding explains it"
        )
        lines.append(f"DIFFERENT output for prompt {numbers}: {known}")
    if report.get("tree_note"):
        lines.append(f"tree {report['tree_note']}")
    if "sweep" in report:
        lines += ["", describe_sweep(report["sweep"])]
    return "\n".join(lines)


def _row(title: str, side: Mapping[str, Any]) -> list[Any]:
    """One way's line. Plain decoding is the measure of the others."""
    speedup, overhead, length = side.get("speedup", 1.0), side.get("overhead", 1.0), side.get("mean_acceptance_length", 1.0)
    times = [f"{side['ms_per_step']:.2f}", f"{overhead:.2f}×", f"{side['host_fraction']:.1%}"]
    return [title, f"{side['tokens_per_s']:.1f}", f"{speedup:.2f}×", f"{length:.2f}", f"{side.get('rows', 1):.1f}", *times]
