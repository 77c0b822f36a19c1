"""From runs to the numbers and the table of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .process import Run

BASELINE = "llama.cpp"
REFERENCE = "ours-plain"
_MIB = 1024 * 1024
_HEADER = (
    "system",
    "version",
    "tokens/s",
    "× llama.cpp",
    "decode tokens/s",
    "first token ms",
    "load s",
    "peak RSS MiB",
    "install MiB",
    "same output",
)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over prompts; a prompt's value is the median of its repeats."""
    rates = per_prompt(runs, "tokens_per_s")
    decode = per_prompt(runs, "decode_tokens_per_s")
    firsts = per_prompt(runs, "first_token_seconds")
    result: dict[str, Any] = {
        "tokens_per_s": statistics.median(rates.values()),
        "decode_tokens_per_s": statistics.median(decode.values()) if decode else None,
        "first_token_s": statistics.median(firsts.values()) if firsts else None,
        "other_cpus": statistics.median(run.other_cpus for run in runs),
    }
    counted = [run for run in runs if run.steps]
    if counted:
        result["mean_acceptance_length"] = sum(len(run.tokens) - 1 for run in counted) / sum(run.steps or 0 for run in counted)
    return result


def ratio(runs: Sequence[Run], baseline: Sequence[Run]) -> float | None:
    """The median over prompts of our rate by the baseline's on the same prompt, prefill included."""
    ours, theirs = per_prompt(runs, "tokens_per_s"), per_prompt(baseline, "tokens_per_s")
    shared = sorted(ours.keys() & theirs.keys())
    return statistics.median(ours[prompt] / theirs[prompt] for prompt in shared) if shared else None


def agreement(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, float]:
    """How many prompts got the reference's very tokens; the share of its tokens that came before the first difference."""
    expected = {run.prompt: run.tokens for run in reference}
    compared = {run.prompt: run.tokens for run in runs if run.prompt in expected}
    prefixes = [common_prefix(tokens, expected[prompt]) for prompt, tokens in compared.items()]
    return {
        "prompts": len(compared),
        "identical": sum(tokens == expected[prompt] for prompt, tokens in compared.items()),
        "prefix_share": sum(prefixes) / sum(len(expected[prompt]) for prompt in compared),
    }


def per_prompt(runs: Iterable[Run], figure: str) -> dict[int, float]:
    """The median of a figure for each prompt that has it."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value = getattr(run, figure)
        if value is not None:
            values.setdefault(run.prompt, []).append(value)
    return {prompt: statistics.median(group) for prompt, group in values.items()}


def system_entry(greeting: Mapping[str, Any], load_s: float, peak_rss_bytes: int, runs: Sequence[Run]) -> dict[str, Any]:
    """All that is known of one system that ran, apart from comparisons."""
    return {
        "status": "measured",
        "versions": greeting["versions"],
        "python": greeting["python"],
        **summary(runs),
        "load_s": load_s,
        "peak_rss_mib": peak_rss_bytes / _MIB,
        "install_mib": sum(greeting["install_bytes"].values()) / _MIB,
        "install_bytes": greeting["install_bytes"],
        "runs": [asdict(run) for run in runs],
    }


def compare(systems: dict[str, dict[str, Any]], runs: Mapping[str, Sequence[Run]]) -> None:
    """Add to each measured system its ratio to the baseline, its agreement with ours, and its weight less what all share."""
    measured = [entry for entry in systems.values() if entry["status"] == "measured"]
    sets = {frozenset(entry["install_bytes"]) for entry in measured}
    shared = frozenset.intersection(*sets) if len(sets) > 1 else frozenset()
    for name, entry in systems.items():
        if entry["status"] != "measured":
            continue
        sizes = entry["install_bytes"]
        entry["install_unshared_mib"] = sum(size for package, size in sizes.items() if package not in shared) / _MIB
        entry["ratio_to_llama_cpp"] = ratio(runs[name], runs[BASELINE]) if BASELINE in runs else None
        entry["agreement"] = agreement(runs[name], runs[REFERENCE]) if REFERENCE in runs else None


def markdown(report: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, fastest first, with what couldn't be measured below it."""
    systems: Mapping[str, Mapping[str, Any]] = report["systems"]
    measured = sorted((e for e in systems.values() if e["status"] == "measured"), key=lambda entry: -entry["tokens_per_s"])
    lines = [row(_HEADER), row(["---", "---", *["---:"] * (len(_HEADER) - 2)])]
    lines += [row(_cells(entry)) for entry in measured]
    others = [entry for entry in systems.values() if entry["status"] != "measured"]
    notes = [f"- {entry['label']}: {entry['status']}: {entry['reason']}" for entry in others]
    environment, settings = report["environment"], report["settings"]
    caption = (
        f"{environment['cpu']}, {settings['threads']} threads, fp32, greedy; {settings['prompts']} prompts "
        f"× {settings['repeats']}, at most {settings['max_new_tokens']} new tokens; medians over prompts."
    )
    return "\n".join([caption, "", *lines, *(["", *notes] if notes else [])])


def _cells(entry: Mapping[str, Any]) -> list[str]:
    same = entry["agreement"]
    return [
        entry["label"],
        next(iter(entry["versions"].values())) or "",
        number(entry["tokens_per_s"], 1),
        number(entry["ratio_to_llama_cpp"], 2),
        number(entry["decode_tokens_per_s"], 1),
        number(None if entry["first_token_s"] is None else entry["first_token_s"] * 1000, 0),
        number(entry["load_s"], 1),
        number(entry["peak_rss_mib"], 0),
        number(entry["install_unshared_mib"], 0),
        "" if same is None else f"{same['identical']}/{same['prompts']}",
    ]


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
