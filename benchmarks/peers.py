"""Compare medusa-deploy with other engines: the same weights, prompts, threads and greedy settings, in turns.

Usage: ``python benchmarks/peers.py --model DIR --bundle DIR [--python PEERS_VENV/bin/python] [--slots 4,8]``

Prints a Markdown table; writes the report to benchmarks/results/peers-<cpu>.json or where --json says. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peer.convert import converted, fingerprint, python_for
from peer.process import PeerError, Worker, measure, settle
from peer.report import compare, markdown, system_entry
from peer.several import compare_several, markdown_several, measure_several, several_entry
from peer.systems import ONE, SEVERAL, SYSTEMS

from medusa_deploy.tools.console import Progress, names_among, positive_int, positive_ints, say, write_json
from medusa_deploy.tools.machine import measured_on

HERE = Path(__file__).resolve().parent
ENCODER = "ours-plain"
CAPACITY_STEP = 256


def start(name: str, pythons: Mapping[str, str], threads: int, cache: Path) -> Worker:
    """A worker process for a system."""
    return Worker([python_for(name, pythons), "-m", "peer.serve", name], cache / "logs" / f"{name}.log", threads)


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """The prompts as token ids, with what ends an answer.

    Raises:
        PeerError: medusa-deploy isn't installed.
    """
    pythons = dict(args.python)
    encoder = start(ENCODER, pythons, args.threads, args.cache)
    try:
        if not encoder.greeting["installed"]:
            raise PeerError(f"medusa-deploy isn't installed in {python_for(ENCODER, pythons)}: {SYSTEMS[ENCODER].install}")
        prompts_file = None if args.prompts is None else str(args.prompts)
        encoded = encoder.ask("encode", path=str(args.bundle), prompts=prompts_file, count=args.count)
        encoder.ask("quit")
        return encoded
    finally:
        encoder.stop()


def load_systems(
    args: argparse.Namespace, encoded: Mapping[str, Any], stack: ExitStack, progress: Progress, slots: int = 1
) -> tuple[dict[str, dict[str, Any]], dict[str, Worker], dict[str, float]]:
    """Start and load every system that can be, and warm it up.

    Returns:
        An entry of the report for each system that was asked for, the workers that are ready, and their loading times.
    """
    pythons = dict(args.python)
    prompts: list[list[int]] = encoded["prompts"]
    longest = max(map(len, prompts)) + args.max_new_tokens
    settings = {
        "threads": args.threads,
        "capacity": -(-longest // CAPACITY_STEP) * CAPACITY_STEP,
        "eos_token_ids": encoded["eos_token_ids"],
        "slots": slots,
        "ignore_eos": args.ignore_eos,
    }
    systems: dict[str, dict[str, Any]] = {
        name: {"label": SYSTEMS[name].label, "precision": SYSTEMS[name].precision} for name in args.systems
    }
    workers: dict[str, Worker] = {}
    loads: dict[str, float] = {}
    for name, entry in systems.items():
        progress.phase(f"loading {name}")
        try:
            worker = start(name, pythons, args.threads, args.cache)
            stack.callback(worker.stop)
            if not worker.greeting["installed"]:
                entry.update(status="not installed", reason=SYSTEMS[name].install)
                continue
            loads[name] = worker.ask("load", path=str(model_path(name, args, pythons)), **settings)["seconds"]
            few = min(8, args.max_new_tokens)
            if slots > 1:
                worker.ask("run_many", prompts=prompts[:slots], max_new_tokens=few)
            else:
                worker.ask("run", token_ids=prompts[0], max_new_tokens=few)
            settle(worker.pid)
            workers[name] = worker
        except PeerError as error:
            entry.update(status="failed", reason=str(error))
    return systems, workers, loads


def run_peers(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every system that can be, one prompt at a time; the report has an entry for each that was asked for."""
    with ExitStack() as stack, Progress("tokenising") as progress:
        encoded = encode(args)
        prompts = encoded["prompts"]
        systems, workers, loads = load_systems(args, encoded, stack, progress)
        progress.phase("measuring", len(prompts) * args.repeats)
        runs, failed = measure(
            workers, prompts, max_new_tokens=args.max_new_tokens, repeats=args.repeats, progress=progress.update
        )
        for name, done in runs.items():
            peak = workers[name].ask("quit")["peak_rss_bytes"]
            systems[name].update(system_entry(workers[name].greeting, loads[name], peak, done))
        for name, reason in failed.items():
            systems[name].update(status="failed", reason=reason)
    compare(systems, runs)
    generated = [len(run.tokens) for done in runs.values() for run in done]
    return {**conditions(args, encoded, generated, dtype="fp32", batch=1), "systems": systems}


def run_several(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every system that can be with several prompts at a time, for each number of ``args.slots``."""
    slots_entries = []
    generated: list[int] = []
    with Progress("tokenising") as progress:
        encoded = encode(args)
        for slots in args.slots:
            with ExitStack() as stack:
                systems, workers, loads = load_systems(args, encoded, stack, progress, slots)
                progress.phase(f"measuring {slots} at a time", args.repeats)
                rounds, failed = measure_several(
                    workers,
                    encoded["prompts"],
                    max_new_tokens=args.max_new_tokens,
                    repeats=args.repeats,
                    progress=progress.update,
                )
                for name, done in rounds.items():
                    peak = workers[name].ask("quit")["peak_rss_bytes"]
                    systems[name].update(several_entry(workers[name].greeting, loads[name], peak, done))
                for name, reason in failed.items():
                    systems[name].update(status="failed", reason=reason)
            generated += [len(tokens) for done in rounds.values() for tokens in done[0].answers]
            slots_entries.append({"slots": slots, "best": compare_several(systems, rounds), "systems": systems})
    return {**conditions(args, encoded, generated, ignore_eos=args.ignore_eos), "slots": slots_entries}


def model_path(name: str, args: argparse.Namespace, pythons: Mapping[str, str]) -> Path:
    """What a system loads, converted if need be."""
    form = SYSTEMS[name].format
    if form == "bundle":
        return Path(args.bundle)
    return Path(args.model) if form == "model" else converted(form, args.model, args.cache, pythons)


def conditions(args: argparse.Namespace, encoded: Mapping[str, Any], generated: Sequence[int], **more: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "environment": {
            **measured_on(),
            "platform": platform.platform(),
        },
        "settings": {
            "decoding": "greedy",
            **more,
            "threads": args.threads,
            "prompts": len(encoded["prompts"]),
            "prompt_tokens": statistics.median(map(len, encoded["prompts"])),
            "generated_tokens": statistics.median(generated) if generated else None,
            "max_new_tokens": args.max_new_tokens,
            "repeats": args.repeats,
            "weights": fingerprint(args.model),
            "bundle_manifest_sha256": encoded["manifest_sha256"],
        },
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="peers.py", description=(__doc__ or "").split("\n", 1)[0])
    add = result.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the backbone as a Hugging Face folder of fp32 safetensors")
    add("--bundle", type=Path, required=True, metavar="DIR", help="the bundle exported from it, with heads")
    add(
        "--systems",
        type=names_among("system", SYSTEMS),
        metavar="A,B",
        help=f"of {', '.join(SYSTEMS)} (default: those in fp32; with --slots those in fp32 and 8 bits that can)",
    )
    add("--prompts", type=Path, metavar="FILE", help="JSONL of prompts (default: the held-out prompts)")
    add("--count", type=positive_int, default=16, metavar="N", help="prompts to take (default 16)")
    add("--max-new-tokens", type=positive_int, default=128, metavar="N", help="longest answer (default 128)")
    add("--slots", type=several, default=(), metavar="N,N", help="answer so many prompts at a time, for each N from 2")
    add("--ignore-eos", action="store_true", help="give every answer --max-new-tokens tokens; with --slots")
    add("--repeats", type=positive_int, default=1, metavar="N", help="times that every prompt is run (default 1)")
    add("--threads", type=positive_int, default=2, metavar="N", help="threads of every system (default 2)")
    add(
        "--python",
        type=interpreter,
        action="append",
        default=[],
        metavar="[SYSTEM=]PATH",
        help="Python with the peers installed, for all of them or for one; optimum-intel=PATH is for openvino's conversion",
    )
    add("--cache", type=Path, default=Path("build/peers"), metavar="DIR", help="converted models and logs (default build/peers)")
    add("--json", metavar="OUT", help="where the report goes (default benchmarks/results/peers-<cpu>.json)")
    return result


def several(text: str) -> tuple[int, ...]:
    """An argparse type: integers from 2, with commas between them."""
    numbers = positive_ints(text)
    if 1 in numbers:
        raise argparse.ArgumentTypeError("one prompt at a time is measured without --slots")
    return numbers


def interpreter(text: str) -> tuple[str, str]:
    """An argparse type: ``PATH`` or ``SYSTEM=PATH``."""
    name, separator, path = text.partition("=")
    name, path = (name, path) if separator else ("", text)
    if name not in {"", "optimum-intel", *SYSTEMS}:
        raise argparse.ArgumentTypeError(f"unknown system {name!r}; known: optimum-intel, {', '.join(SYSTEMS)}")
    if shutil.which(path) is None:
        raise argparse.ArgumentTypeError(f"{path!r} can't be run")
    return name, path


def default_output(cpu: str, slots: Sequence[int]) -> Path:
    """Where results of a processor are kept."""
    return HERE / "results" / f"peers-{'slots-' if slots else ''}{re.sub('[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the systems are as many as can be measured so where none are named."""
    read = parser()
    args = read.parse_args(argv)
    if args.systems is None:
        args.systems = list(SEVERAL if args.slots else ONE)
    if args.ignore_eos and not args.slots:
        read.error("--ignore-eos is of --slots")
    if alone := [name for name in args.systems if args.slots and not SYSTEMS[name].several]:
        read.error(f"--slots: {', '.join(alone)} answers one prompt at a time")
    if args.slots and max(args.slots) > args.count:
        read.error(f"--slots {max(args.slots)} needs as many prompts: --count {max(args.slots)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit status."""
    args = arguments(argv)
    try:
        result = run_several(args) if args.slots else run_peers(args)
    except PeerError as error:
        say(f"error: {error}")
        return 1
    print(markdown_several(result) if args.slots else markdown(result))
    write_json(result, args.json or default_output(result["environment"]["cpu"], args.slots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
