"""Several prompts at a time: every system answers the same queue of prompts, N of them at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .process import Run, Talker, in_turns, watched
from .report import agreement, number, row

# Whose tokens the others of a precision are compared with.
REFERENCES = {"fp32": "ours-plain", "8 bits": "ours-int8-plain", "4 bits": "ours-int4-plain"}


@dataclass(frozen=True, slots=True)
class Round:
    """All prompts on one system, N at a time. ``other_cpus``: processors that the rest of the machine kept busy meanwhile."""

    answers: list[list[int]]
    seconds: float
    other_cpus: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers per second, prefills included."""
        return sum(map(len, self.answers)) / self.seconds

    def runs(self) -> list[Run]:
        """The answers as runs without times of their own."""
        return [Run(index, tokens, self.seconds, None, None, self.other_cpus) for index, tokens in enumerate(self.answers)]


def measure_several(
    workers: Mapping[str, Talker],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[int, str], None],
) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """Answer the queue of prompts ``repeats`` times on every system, in turns. Returns as :func:`.process.measure`."""
    queue = [list(prompt) for prompt in prompts]

    def run(worker: Talker, _: int) -> Round:
        answer, others = watched(worker, "run_many", prompts=queue, max_new_tokens=max_new_tokens)
        return Round(answer["answers"], answer["seconds"], others)

    return in_turns(workers, range(repeats), run, progress)


def several_entry(greeting: Mapping[str, Any], load_s: float, peak_rss_bytes: int, rounds: Sequence[Round]) -> dict[str, Any]:
    """What is known of one system that ran, apart from comparisons."""
    return {
        "status": "measured",
        "versions": greeting["versions"],
        "tokens_per_s": statistics.median(each.tokens_per_s for each in rounds),
        "tokens": sum(map(len, rounds[0].answers)),
        "other_cpus": statistics.median(each.other_cpus for each in rounds),
        "load_s": load_s,
        "peak_rss_mib": peak_rss_bytes / (1 << 20),
        "rounds": [asdict(each) for each in rounds],
    }


def compare_several(systems: dict[str, dict[str, Any]], rounds: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Add to each measured system its agreement with ours. Returns for each precision the best peer, ours, and their ratio."""
    best: dict[str, Any] = {}
    for name, entry in systems.items():
        if entry["status"] == "measured":
            reference = rounds.get(REFERENCES[entry["precision"]])
            entry["agreement"] = agreement(rounds[name][0].runs(), reference[0].runs()) if reference else None
    for precision in dict.fromkeys(systems[name]["precision"] for name in rounds):
        rates = {name: systems[name]["tokens_per_s"] for name in rounds if systems[name]["precision"] == precision}
        ours = {name: rate for name, rate in rates.items() if name.startswith("ours")}
        peers = {name: rate for name, rate in rates.items() if name not in ours}
        if not ours or not peers:
            continue
        peer = max(peers, key=lambda name: peers[name])
        best[precision] = {"peer": peer, "of_best_peer": {name: rate / peers[peer] for name, rate in ours.items()}}
    return best


def markdown_several(report: Mapping[str, Any]) -> str:
    """Write a Markdown table for each precision, with a line for each system.

    For each N it has the rate, its share of the best peer's, and the prompts answered with the tokens of our plain decoding.
    """
    environment, settings, loads = report["environment"], report["settings"], report["slots"]
    length = "exactly" if settings["ignore_eos"] else "at most"
    caption = (
        f"{environment['cpu']}, {settings['threads']} threads, greedy; {settings['prompts']} prompts × {settings['repeats']}, "
        f"{length} {settings['max_new_tokens']} new tokens, all at once through N slots; tokens/s of all, prefills included."
    )
    lines = [caption]
    asked = loads[0]["systems"]
    for precision in dict.fromkeys(entry["precision"] for entry in asked.values()):
        names = [name for name, entry in asked.items() if entry["precision"] == precision]
        heads = [head for load in loads for head in (f"N = {load['slots']}: tokens/s", "× best peer", "same output")]
        lines += ["", f"**{precision}**", "", row(["system", *heads]), row(["---", *["---:"] * len(heads)])]
        for name in names:
            entries = [load["systems"][name] for load in loads]
            if any(entry["status"] == "measured" for entry in entries):
                cells = [cell for load, entry in zip(loads, entries, strict=True) for cell in _cells(load, entry)]
                lines.append(row([asked[name]["label"], *cells]))
    notes = [
        f"- {entry['label']}, N = {load['slots']}: {entry['status']}: {entry['reason']}"
        for load in loads
        for entry in load["systems"].values()
        if entry["status"] != "measured"
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _cells(load: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    if entry["status"] != "measured":
        return ["", "", ""]
    best, same = load["best"].get(entry["precision"]), entry["agreement"]
    share = None if best is None else entry["tokens_per_s"] / load["systems"][best["peer"]]["tokens_per_s"]
    return [
        number(entry["tokens_per_s"], 1),
        number(share, 2),
        "" if same is None else f"{same['identical']}/{same['prompts']}",
    ]
