"""Rows chosen in each step, beside fixed numbers of rows; and with heads that are always wrong, beside plain decoding.

Two bundles are made below ``--work`` from the heads of ``--heads``, with random numbers in place of their weights: ``sure``,
whose first candidate always has nearly all of the probability, and ``flat``, whose candidates are all about equally likely.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime import Session, load
from medusa_deploy.runtime.files.heads_file import read_heads_folder, write_heads
from medusa_deploy.runtime.tree import ROOT_ONLY
from medusa_deploy.tools.console import write_json
from medusa_deploy.tools.environment import environment
from medusa_deploy.tools.measure.timed_run import TimedRun, Way, in_turn, timed_run
from medusa_deploy.tools.prompt_source import heldout_prompts

FIXED = (3, 4, 5, 6, 8, 16)
_DEVIATION = {"sure": 2.0, "flat": 1e-4}


def random_heads(source: Path, output: Path, deviation: float) -> Path:
    """Heads of the same form as ``source``; normal weights, integers (token ids) as they are. Nobody measured them."""
    heads, rng = read_heads_folder(source), np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, deviation, tensor.shape).astype(tensor.dtype) if tensor.dtype.kind == "f" else tensor
        for name, tensor in heads.tensors.items()
    }
    write_heads(replace(heads, tensors=tensors), output)
    return output


def adversarial_bundle(name: str, args: argparse.Namespace) -> Path:
    """The bundle ``name``, made if it isn't there."""
    bundle: Path = args.work / f"{name}-bundle"
    if not bundle.is_dir():
        heads = random_heads(args.heads, args.work / f"{name}-heads", _DEVIATION[name])
        export_bundle(args.model, heads, bundle)
    return bundle


def interleaved(session: Session, prompts: list[list[int]], ways: dict[str, Way], tokens: int) -> dict[str, Any]:
    """Every prompt in every way, the ways taking turns in going first; ratios are to the way ``plain``."""
    runs: dict[str, list[TimedRun]] = {name: [] for name in ways}
    for way in ways.values():
        timed_run(session, prompts[0], way, 24)
    for index, prompt in enumerate(prompts):
        for name in in_turn(ways, index):
            runs[name].append(timed_run(session, prompt, ways[name], tokens))
        print(f"{session.bundle.folder.name}: prompt {index + 1} of {len(prompts)}", file=sys.stderr)
    rates = {name: [run.decoded / run.decode_seconds for run in each] for name, each in runs.items()}
    return {
        name: {
            "tokens_per_s": sum(run.decoded for run in each) / sum(run.decode_seconds for run in each),
            "of_plain": sum(run.decode_seconds for run in runs["plain"]) / sum(run.decode_seconds for run in each),
            "median_of_plain": median(a / b for a, b in zip(rates[name], rates["plain"], strict=True)),
            "per_prompt": [round(rate, 2) for rate in rates[name]],
            "same_tokens": [a.tokens == b.tokens for a, b in zip(each, runs["plain"], strict=True)],
            "host_fraction": 1 - sum(run.engine_seconds for run in each) / sum(run.decode_seconds for run in each),
            "choice": [run.choice for run in each],
        }
        for name, each in runs.items()
    }


def main() -> None:
    """Measure, print one line a way, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heads", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle with good heads")
    parser.add_argument("--work", type=Path, default=Path("build/never-slower"))
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--prepare", action="store_true", help="make the bundles and measure nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bundles = {"heads": args.bundle} | {name: adversarial_bundle(name, args) for name in _DEVIATION}
    if args.prepare:
        return
    report: dict[str, Any] = {"prompts": args.prompts, "max_new_tokens": args.max_new_tokens}
    for name, bundle in bundles.items():
        session = load(bundle, prefix_cache=False)
        report.setdefault("environment", environment(session))
        prompts = [session.encode(line.request()) for line in heldout_prompts()[: args.prompts]]
        ways = {"plain": Way(ROOT_ONLY), "automatic": Way(lookup=True)}
        if name == "heads":
            ways |= {f"rows {rows}": Way(rows=rows, lookup=True) for rows in FIXED}
        else:
            ways |= {"automatic, no lookup": Way()}
        report[name] = interleaved(session, prompts, ways, args.max_new_tokens)
        for way, found in report[name].items():
            print(f"{name:6} {way:20} {found['tokens_per_s']:6.1f} tokens/s  {found['of_plain']:.3f}× plain")
    if args.json is not None:
        write_json(report, args.json)


if __name__ == "__main__":
    main()
