"""``medusa-deploy bench``: plain against Medusa decoding on the same engine, prompt by prompt, in one run."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime.files.manifest import Manifest
    from ...runtime.session import Session
    from ...runtime.tree import Tree
    from ..measure.timed_run import TimedRun, Way

HELP = "measure plain against Medusa decoding, interleaved"

Advance = Callable[[int, str], object]
_WARMUP_TOKENS = 16
_TITLES = {
    "plain": "plain",
    "medusa": "Medusa",
    "best_rows": "rows chosen by the host",
    "heads_only": "without lookup",
    "fixed_tree": "on a fixed tree",
    "typical": "typical acceptance, lossy",
}
_LOSSY = ("typical",)


def bench(
    session: Session,
    prompts: Sequence[list[int]],
    *,
    rows: int | None = None,
    fixed_rows: Sequence[int] = (),
    tree: Tree | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    repeats: int = 3,
    warmup: int = 1,
    progress: Advance = lambda _done, _note: None,
) -> dict[str, Any]:
    """Decode every prompt in several ways, ``repeats`` times: greedily, or sampled at a ``temperature`` with one ``seed``.

    ``plain``; ``medusa``, as sessions draft by default, with ``rows`` rows a step (None: as many as pay, in each step);
    ``heads_only``, the same without prompt lookup; ``rows_N`` for each of ``fixed_rows``: N rows in every step; with a ``tree``,
    ``fixed_tree``: these rows in every step; where tokens are sampled, ``typical``: Medusa's lossy acceptance. Where steps run
    ahead of the host and no ``rows`` are given, ``medusa`` is the bundle's tree, as sessions draft there, and ``best_rows`` what
    ``medusa`` is elsewhere. ``rows`` in the report is the mean over steps, ``rows_histogram`` says how many steps had 0, 1, 2 …
    rows, ``plain_steps`` and ``probes`` are counted as in :class:`..runtime.sequence.Stats`, whose ``trust`` and ``costs`` stand
    there as the last run left them.
    The ways follow each other on each prompt and take turns in going first, so that what else the machine does hits them all.
    Rates are of decoding: tokens after the first, over the wall time of the steps. A prompt's time is the median of its repeats;
    a way's rate is all prompts' tokens over all prompts' time, and ``speedup`` the ratio of two such rates. ``median_speedup`` is
    the median of the prompts' own ratios: text that repeats itself raises the first more than the second.
    ``progress(done, note)`` follows each of the prompts × repeats × ways runs.

    Raises:
        CapacityError, TreeError: a prompt or the tree doesn't fit.
        UsageError: nothing to measure.
    """
    from ...runtime.errors import UsageError
    from ..environment import plain_step_bytes, variant
    from ..measure.near_tie import rounds_activations
    from ..measure.timed_run import timed_run
    from ..prompt_source import check_room

    if not prompts or repeats < 1 or max_new_tokens < 2:
        raise UsageError(
            f"{len(prompts)} prompts, {repeats} repeats, {max_new_tokens} tokens", hint="at least 1 prompt, 1 repeat and 2 tokens"
        )
    check_room(session, list(prompts), max_new_tokens)
    ways = ways_of(session, rows, fixed_rows, tree, temperature, seed)
    for _ in range(warmup):
        for way in ways.values():
            timed_run(session, prompts[0], way, min(max_new_tokens, _WARMUP_TOKENS))
    runs: dict[str, list[list[TimedRun]]] = {name: [[] for _ in prompts] for name in ways}
    done = 0
    for repeat in range(repeats):
        for index, prompt in enumerate(prompts):
            first = (repeat + index) % len(ways)
            for name in [*ways, *ways][first : first + len(ways)]:
                runs[name][index].append(timed_run(session, prompt, ways[name], max_new_tokens))
                progress(done := done + 1, f"prompt {index + 1}, {name}")
    report = summarise(runs)
    if tree is not None:
        report["fixed_tree"]["choices"] = tree.choices()
    seconds = report["plain"]["ms_per_step"] / 1e3
    read = plain_step_bytes(session.manifest, variant(session))
    report["bandwidth_gb_s"] = None if read is None else read / seconds / 1e9
    report["rounds_activations"] = rounds_activations(session)
    sampled = {"temperature": temperature, "seed": seed} if temperature > 0 else {}
    return {"prompts": len(prompts), "repeats": repeats, "max_new_tokens": max_new_tokens, **sampled, **report}


def ways_of(
    session: Session,
    rows: int | None,
    fixed_rows: Sequence[int] = (),
    tree: Tree | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Way]:
    """The ways that :func:`bench` compares, by name."""
    from ...runtime.executors.executor import AheadExecutor
    from ...runtime.tree import ROOT_ONLY
    from ..measure.timed_run import Way

    best, heads_only = (Way(rows=rows, lookup=lookup) for lookup in (True, False))
    ways = {"plain": Way(ROOT_ONLY), "medusa": best, "heads_only": heads_only}
    if rows is None and isinstance(session.executor, AheadExecutor):
        heads_only = Way(rows=session.tree.rows)  # without a number, these sessions take the tree
        ways = {"plain": Way(ROOT_ONLY), "medusa": Way(session.tree), "best_rows": best, "heads_only": heads_only}
    ways |= {f"rows_{number}": Way(rows=number, lookup=True) for number in fixed_rows}
    if tree is not None:
        ways["fixed_tree"] = Way(tree)
    return _sampled(ways, temperature, seed) if temperature > 0 else ways


def _sampled(ways: Mapping[str, Way], temperature: float, seed: int) -> dict[str, Way]:
    """The ways at a temperature, where equal seeds give equal text, and typical acceptance, where they don't."""
    from ...runtime.sampling import SamplingParams
    from ..measure.timed_run import Way

    sampled = SamplingParams("sample", temperature=temperature, seed=seed)
    typical = Way(lookup=True, params=SamplingParams("typical", temperature=temperature))
    return {**{name: replace(way, params=sampled) for name, way in ways.items()}, "typical": typical}


def summarise(runs: Mapping[str, Sequence[Sequence[TimedRun]]]) -> dict[str, Any]:
    """The report of the runs [prompt][repeat] of each way; ``plain`` and ``medusa`` are among them.

    Raises:
        UsageError: no prompt led to a decode step.
    """
    from ...runtime.errors import UsageError

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
    """How many rows the steps had; and why, where that was chosen."""
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
    """One way's numbers; ``host_fraction`` is the share of the decoding wall time that the engine didn't take."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    from ..console import add_json_argument, non_negative, positive_int, positive_ints
    from ..engine_options import add_engine_arguments
    from ..prompt_source import add_prompt_arguments

    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens per prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="times every prompt runs (default: %(default)s)")
    parser.add_argument(
        "--tree", metavar="NAME|FILE", help="also measure a fixed tree: one of the bundle's, or as in verify --trees"
    )
    parser.add_argument("--rows", type=positive_int, metavar="N", help="rows of a step (default: as many as pay)")
    parser.add_argument(
        "--fixed-rows", type=positive_ints, default=(), metavar="N,N,…", help="also measure so many rows in every step"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure the step time for 1 to 16 rows, and the tree size it suggests"
    )
    parser.add_argument(
        "--temperature", type=non_negative, default=0.0, metavar="T", help="sample; measures typical acceptance, too (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples, random prompts and trees (default: %(default)s)")
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Bench and print; 1 when the ways of decoding emitted different tokens, and the graph isn't one that rounds to 8 bits."""
    from ..console import Progress, emit
    from ..engine_options import load_session
    from ..environment import environment
    from ..prompt_source import prompts_for

    session = load_session(args)
    tree, note = _tree(session.manifest, args.tree, args.seed)
    prompts = prompts_for(session, args.prompts, args.count, args.seed)
    ways = ways_of(session, args.rows, args.fixed_rows, tree, args.temperature, args.seed)
    with Progress("bench", len(ways) * len(prompts) * args.repeats) as bar:
        options = {name: getattr(args, name) for name in ("temperature", "seed", "max_new_tokens", "repeats")}
        options["progress"] = bar.update
        report = bench(session, prompts, rows=args.rows, fixed_rows=args.fixed_rows, tree=tree, **options)
        if args.sweep:
            from ..measure.row_sweep import row_sweep

            bar.phase("sweep")
            report["sweep"] = row_sweep(session, progress=bar.update)
    facts = environment(session) | {"threads": args.threads, "backend": args.backend}
    report = {"environment": facts, **report} | ({"tree_note": note} if note else {})
    emit(describe(report), report, args.json)
    return 1 if report["equal"]["different"] and not report["rounds_activations"] else 0


def _tree(manifest: Manifest, name: str | None, seed: int) -> tuple[Tree | None, str]:
    """The tree asked for, and what was cut from it to fit."""
    from ..tree_set import trees_for

    if name is None:
        return None, ""
    chosen = trees_for(manifest, [name], seed)
    [(key, tree)] = chosen.trees.items()
    return tree, chosen.notes.get(key, "")


def describe(report: Mapping[str, Any]) -> str:
    """The report for a person, headline first."""
    from ..console import table

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
        from ..measure.row_sweep import describe_sweep

        lines += ["", describe_sweep(report["sweep"])]
    return "\n".join(lines)


def _row(title: str, side: Mapping[str, Any]) -> list[Any]:
    """One way's line; plain decoding is what the others are measured by."""
    speedup, overhead, length = side.get("speedup", 1.0), side.get("overhead", 1.0), side.get("mean_acceptance_length", 1.0)
    times = [f"{side['ms_per_step']:.2f}", f"{overhead:.2f}×", f"{side['host_fraction']:.1%}"]
    return [title, f"{side['tokens_per_s']:.1f}", f"{speedup:.2f}×", f"{length:.2f}", f"{side.get('rows', 1):.1f}", *times]
