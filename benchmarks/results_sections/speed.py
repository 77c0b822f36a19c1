"""Sections about speed: against plain decoding, beside other engines, sampled, and with rows chosen in each step."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from .markdown import link, report, share, table

PEERS = "peers-few-bits-amd-epyc"
# Report of bench → the name of its heads in the tables.
FP32 = {
    "smollm2-grounded": "Medusa-1, grounded heads",
    "smollm2-medusa-2": "Medusa-2",
    "smollm2-medusa": "Medusa-1, heads of the paper's form",
}
WAYS = {
    "medusa": "{heads}, with prompt lookup",
    "heads_only": "the same without lookup",
    "rows_16": "the same with lookup, 16 rows in every step",
    "typical": "typical acceptance (lossy)",
}


def bench_rows(found: Mapping[str, Any], heads: str, plain: str = "plain") -> list[tuple[str, ...]]:
    """Rows of one report of ``bench``: plain decoding, then its ways of Medusa decoding."""
    rows = [(plain, found["plain"], 1.0, 1.0, 1.0)]
    for key, name in WAYS.items():
        if way := found.get(key):
            rows.append((name.format(heads=heads), way, way["speedup"], way["mean_acceptance_length"], way["rows"]))
    return [
        (
            name,
            f"{way['tokens_per_s']:.1f}",
            f"{speedup:.2f}×",
            f"{length:.2f}",
            f"{count:.1f}",
            f"{way['ms_per_step']:.1f}",
            share(way["host_fraction"]),
        )
        for name, way, speedup, length, count in rows
    ]


_BENCH_HEADER = ("", "tokens/s", "speed-up", "mean acceptance length", "rows a step", "ms a step", "time outside the engine")


def medusa() -> str:
    """Plain against Medusa decoding, a run a set of heads."""
    rows = [row for name, heads in FP32.items() for row in bench_rows(report(name), heads)]
    rows += bench_rows(report("smollm2-int8"), "8 bits, grounded heads", "8 bits, plain")
    grounded, second, eight = report("smollm2-grounded"), report("smollm2-medusa-2"), report("smollm2-int8")
    equal = [report(name)["equal"] for name in FP32]
    cost = {name: found["medusa"]["costs"]["4"] for name, found in (("first", grounded), ("second", second), ("eight", eight))}
    same = "All" if all(found["prompts"] == found["of"] for found in equal) else "Not all"
    return f"""## Medusa beside plain decoding

SmolLM2-135M-Instruct, {grounded["environment"]["cores"]} cores of an {grounded["environment"]["cpu"]} (AVX-512), greedy,
{grounded["prompts"]} held-out chat prompts, at most {grounded["max_new_tokens"]} tokens, batch 1. Every plain row begins a run of
its own:

{table(_BENCH_HEADER, rows)}

- tokens/s: the tokens of all prompts ÷ their decoding time, without prefill. Each figure is the median of
  {grounded["repeats"]} runs.
- A speed-up divides by plain decoding in the same run. Plain decoding leaves the heads out.
- {same} fp32 answers were equal token for token in all ways. In 8 bits {eight["equal"]["prompts"]} of {eight["equal"]["of"]}
  were ([why](quantisation.md#what-isnt-exact-any-more)).
- Reports: {", ".join(link(name, heads) for name, heads in FP32.items())}, {link("smollm2-int8", "8 bits")}.

Each step verifies as many rows as pay, so the rows depend on the machine, and here on the minute: how fast it reads memory
varies. Where a plain step takes longer, more rows cost less. A step of 4 rows cost {cost["first"]:.2f}× a plain step in the run
of the grounded heads, {cost["second"]:.2f}× in that of Medusa-2 and {cost["eight"]:.2f}× in 8 bits. Two other runs of the
grounded heads on the same day and graph, without a report, gave 97.7 and 149.6 tokens/s (1.53×; 4 rows at 1.40×) and 78.2 and
136.9 (1.75×; 4 rows at 1.20×). An earlier run in 8 bits gave 184.0 and 258.0 (1.40×; 4 rows at 1.37×)."""


def sampled() -> str:
    """Decoding at a temperature."""
    found = report("smollm2-t0.7")
    rows = [row[:4] for row in bench_rows(found, "Medusa-1, grounded heads")]
    return f"""## Sampled

The same prompts at temperature {found["temperature"]}, medians of {found["repeats"]} runs ({link("smollm2-t0.7")}):

{table(_BENCH_HEADER[:4], rows)}

With equal seeds the text is that of plain sampling, except for typical acceptance. It was in {found["equal"]["prompts"]} of
{found["equal"]["of"]} texts. In the others a draw fell within 2·10⁻⁷ of the edge between two tokens:
there a sum in another order decides otherwise."""


def per_prompt(system: Mapping[str, Any]) -> dict[int, float]:
    """Tokens/s of a system on each prompt: the median of its repeats."""
    rates: dict[int, list[float]] = {}
    for run in system["runs"]:
        rates.setdefault(run["prompt"], []).append(len(run["tokens"]) / run["seconds"])
    return {prompt: median(found) for prompt, found in rates.items()}


def ratio(system: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """The median over prompts of the ratio of two systems' tokens/s on the same prompt."""
    ours, theirs = per_prompt(system), per_prompt(baseline)
    return median(ours[prompt] / theirs[prompt] for prompt in ours.keys() & theirs.keys())


_LABELS = {"llama.cpp (llama-cpp-python)": "llama.cpp, F32"}


def _peer_table(found: Mapping[str, Any]) -> str:
    measured = [system for system in found["systems"].values() if system["status"] == "measured"]
    rows = []
    for system in sorted(measured, key=lambda system: -system["ratio_to_llama_cpp"]):
        package, version = next(iter(system["versions"].items()))
        rows.append(
            (
                _LABELS.get(system["label"], system["label"]),
                f"{package} {version}",
                f"{system['tokens_per_s']:.1f}",
                f"{system['ratio_to_llama_cpp']:.2f}",
                f"{system['peak_rss_mib']:.0f} MiB",
                f"{system['agreement']['identical']} of {system['agreement']['prompts']}",
            )
        )
    return table(("", "package", "tokens/s", "× llama.cpp F32", "peak RSS", "same output"), rows, texts=2)


def peers() -> str:
    """Other engines with the same weights, prompts and settings."""
    found, earlier = report(PEERS), report("peers-amd-epyc")
    systems, int4 = found["systems"], report("quantise-int4")["products"]
    bits = int4["4"], sum(int4.values())
    plain_gain = systems["ours-int8-plain"]["ratio_to_llama_cpp"] / systems["ours-plain"]["ratio_to_llama_cpp"]
    over_q8 = systems["ours-int8-medusa"]["ratio_to_llama_cpp"] / systems["llama.cpp-q8_0"]["ratio_to_llama_cpp"]
    run = "An earlier run, in fp32 alone"
    if any(name.endswith("-lookup") for name in earlier["systems"]):
        run = "A run in fp32 alone, in which engines draft by their own prompt lookup, too"
    return f"""## Beside other engines

The same weights, {found["settings"]["prompts"]} prompts, at most {found["settings"]["max_new_tokens"]} tokens and
{found["settings"]["threads"]} threads, greedy, batch 1, in one run ({link(PEERS)}, [method](../benchmarks/README.md)):

{_peer_table(found)}

- tokens/s: the median over prompts, prefill included. × llama.cpp F32: the median of the ratios on each prompt.
- same output: prompts answered with exactly the tokens of medusa-deploy's plain decoding in fp32.
- int8 and int4 are variants that `quantise` made. They are lossy: [Weights in 8 bits](#weights-in-8-bits). In this int4, 55 of
  151 products have 4 bits and the others 8; [the report of the search](#weights-in-4-bits) counts {bits[0]} of {bits[1]},
  because the heads were products of their own then.
- In 8 bits plain decoding is {plain_gain:.1f} times as fast as in fp32. With Medusa it is {over_q8:.2f} times as fast as
  llama.cpp's Q8_0. Both are ratios of the medians in the table.

{run} ({link("peers-amd-epyc")}):

{_peer_table(earlier)}"""


_CHOICES = {"heads": "the real heads", "sure": "random heads that are sure and wrong", "flat": "random heads that are never sure"}
_CHOSEN = {"automatic": "chosen", "automatic, no lookup": "chosen, without lookup"}


def chosen_rows() -> str:
    """The number of rows chosen in each step, against fixed numbers."""
    found = report("never-slower")
    rows = []
    for key, heads in _CHOICES.items():
        plain = found[key]["plain"]["per_prompt"]
        for way, entry in found[key].items():
            if way != "plain":
                worst = min(ours / theirs for ours, theirs in zip(entry["per_prompt"], plain, strict=True))
                name = _CHOSEN.get(way, way.removeprefix("rows "))
                rows.append((heads, name, f"{entry['of_plain']:.3f}", f"{entry['median_of_plain']:.3f}", f"{worst:.2f}"))
    exact = all(all(entry["same_tokens"]) for key in _CHOICES for entry in found[key].values())
    chosen, five = found["heads"]["automatic"]["median_of_plain"], found["heads"]["rows 5"]["median_of_plain"]
    return f"""## Rows chosen in each step

Speed as a multiple of plain decoding, {found["prompts"]} held-out prompts × {found["max_new_tokens"]} tokens, a fresh session
a set of heads, with prompt lookup but where it says so ({link("never-slower")}, by `benchmarks/never_slower.py`).
{"All" if exact else "Not all"} tokens are plain decoding's:

{table(("heads", "rows", "all prompts", "median prompt", "worst prompt"), rows, texts=2)}

Choosing buys the floor, the worst prompt. The median prompt gains {chosen:.2f}× with chosen rows and {five:.2f}× with 5 rows in
every step."""


def fixed_trees() -> str:
    """Fixed trees against rows chosen by the heads' probabilities, at equal size."""
    found = report("tree-choice")
    rows = [
        (count, f"{entry['static']:.3f}", f"{entry['chosen']:.3f}", f"{entry['expected_static']:.3f}")
        for count, entry in found["mean_acceptance_length_by_rows"].items()
    ]
    equal = all(entry["equal_output"] for entry in found["mean_acceptance_length_by_rows"].values())
    header = ("rows", "best fixed tree", "rows chosen by the heads' probabilities", "expected of the fixed tree")
    prompts = found["prompts"]
    return f"""## Fixed trees against chosen rows

Mean acceptance lengths at equal size, without prompt lookup, on {prompts["compared"]} held-out prompts of
{prompts["max_new_tokens"]} tokens. The trees are the best for {found["positions_counted"]} positions of {prompts["counted"]}
other prompts ({link("tree-choice")}, by `benchmarks/tree_choice.py`).
{"Both" if equal else "They didn't all"} emitted the same tokens:

{table(header, rows)}"""
