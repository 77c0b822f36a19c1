"""Compare medusa-deploy with other engines: the same weights, prompts, threads and greedy settings, prompt by prompt in turn.

Usage: ``python benchmarks/peers.py --model DIR --bundle DIR [--python PEERS_VENV/bin/python]``

Prints a Markdown table; writes the report to benchmarks/results/peers-<cpu>.json or where --json says. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_process import PeerError, Run, Worker, last_line, measure, settle
from peer_report import compare, markdown, system_entry

from medusa_deploy.runtime.files.bundle import sha256
from medusa_deploy.tools.console import Progress, names_among, positive_int, say, write_json
from medusa_deploy.tools.machine import measured_on

HERE = Path(__file__).resolve().parent
ENCODER = "ours-plain"
CAPACITY_STEP = 256
_GGUF = "model.gguf"


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table. ``format``: what it loads (a key of :func:`conversion`, or ``model`` or ``bundle``)."""

    label: str
    format: str
    install: str


_OURS = "pip install 'medusa-deploy[cpu]'"
_LLAMA = System("llama.cpp (llama-cpp-python)", "gguf", "pip install llama-cpp-python")
SYSTEMS = {
    "llama.cpp": _LLAMA,
    "llama.cpp-f32-cache": System("llama.cpp, fp32 cache", "gguf", _LLAMA.install),
    "onnxruntime-genai": System("onnxruntime-genai", "onnxruntime-genai", "pip install onnxruntime-genai"),
    "transformers": System("transformers (sdpa)", "model", "pip install transformers torch"),
    "openvino-genai": System("openvino-genai", "openvino", "pip install openvino-genai"),
    "ours-plain": System("medusa-deploy, plain", "bundle", _OURS),
    "ours-medusa": System("medusa-deploy, Medusa", "bundle", _OURS),
}
DEFAULT_SYSTEMS = tuple(name for name in SYSTEMS if name != "llama.cpp-f32-cache")
# Weights in few bits; the bundle has the variants that `medusa-deploy quantise` made of it.
SYSTEMS |= {
    "llama.cpp-q8_0": System("llama.cpp, Q8_0", "gguf-q8_0", _LLAMA.install),
    "llama.cpp-q4_k_m": System("llama.cpp, Q4_K_M", "gguf-q4_k_m", _LLAMA.install),
    "ours-int8-plain": System("medusa-deploy int8, plain", "bundle", _OURS),
    "ours-int8-medusa": System("medusa-deploy int8, Medusa", "bundle", _OURS),
    "ours-int4-plain": System("medusa-deploy int4, plain", "bundle", _OURS),
    "ours-int4-medusa": System("medusa-deploy int4, Medusa", "bundle", _OURS),
}


def conversion(form: str, model: Path, output: Path, pythons: Mapping[str, str]) -> list[str]:
    """The command that writes ``model`` into the folder ``output`` in a peer's own format.

    ``model``: a folder of fp32 safetensors; for GGUF in few bits, the F32 GGUF file.
    """
    script, _, kind = form.partition("-")
    if script == "gguf" and kind:
        return [python_for("llama.cpp", pythons), str(HERE / "peer_few_bits.py"), str(model), str(output / _GGUF), kind]
    commands = {
        "gguf": [sys.executable, str(HERE / "peer_gguf.py"), str(model), str(output / _GGUF)],
        "onnxruntime-genai": [
            *(python_for("onnxruntime-genai", pythons), "-m", "onnxruntime_genai.models.builder"),
            *("-i", str(model), "-o", str(output), "-p", "fp32", "-e", "cpu", "-c", str(output / "cache")),
        ],
        "openvino": [
            *(pythons.get("optimum-intel") or python_for("openvino-genai", pythons), "-m", "optimum.commands.optimum_cli"),
            *("export", "openvino", "--model", str(model), "--task", "text-generation-with-past", "--weight-format", "fp32"),
            str(output),
        ],
    }
    return commands[form]


def converted(form: str, model: Path, cache: Path, pythons: Mapping[str, str]) -> Path:
    """The model in a peer's format, converted once for these weights and kept under ``cache``.

    Raises:
        PeerError: the conversion failed.
    """
    folder = cache / fingerprint(model) / form
    if not folder.is_dir():
        log = cache / "logs" / f"convert-{form}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.with_name(f"{form}.{os.getpid()}.partial")
        staged.mkdir(parents=True)
        try:
            source = converted("gguf", model, cache, pythons) if form.startswith("gguf-") else model
            command = conversion(form, source, staged, pythons)
            with log.open("wb") as output:
                status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
            if status:
                raise PeerError(f"conversion ended with status {status}: {last_line(log)} (see {log})")
            staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder / _GGUF if form.startswith("gguf") else folder


def fingerprint(model: Path) -> str:
    """Twelve digits that name the weights and the configuration of a folder."""
    files = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()[:12]


def python_for(name: str, pythons: Mapping[str, str]) -> str:
    """The interpreter of a system: its own, else the one for all peers, else this one. Ours run in this one unless named."""
    shared = sys.executable if name.startswith("ours") else pythons.get("", sys.executable)
    return pythons.get(name, shared)


def start(name: str, pythons: Mapping[str, str], threads: int, cache: Path) -> Worker:
    """A worker process for a system."""
    return Worker([python_for(name, pythons), str(HERE / "peer_serve.py"), name], cache / "logs" / f"{name}.log", threads)


def run_peers(args: argparse.Namespace) -> dict[str, Any]:
    """Start, load and measure every system that can be; the report has an entry for each that was asked for."""
    pythons = dict(args.python)
    systems: dict[str, dict[str, Any]] = {name: {"label": SYSTEMS[name].label} for name in args.systems}
    with ExitStack() as stack, Progress("tokenising") as progress:
        encoder = start(ENCODER, pythons, args.threads, args.cache)
        stack.callback(encoder.stop)
        if not encoder.greeting["installed"]:
            raise PeerError(f"medusa-deploy isn't installed in {python_for(ENCODER, pythons)}: {_OURS}")
        prompts_file = None if args.prompts is None else str(args.prompts)
        encoded = encoder.ask("encode", path=str(args.bundle), prompts=prompts_file, count=args.count)
        encoder.ask("quit")
        prompts: list[list[int]] = encoded["prompts"]
        longest = max(map(len, prompts)) + args.max_new_tokens
        settings = {
            "threads": args.threads,
            "capacity": -(-longest // CAPACITY_STEP) * CAPACITY_STEP,
            "eos_token_ids": encoded["eos_token_ids"],
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
                worker.ask("run", token_ids=prompts[0], max_new_tokens=min(8, args.max_new_tokens))
                settle(worker.pid)
                workers[name] = worker
            except PeerError as error:
                entry.update(status="failed", reason=str(error))

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
    return report(args, encoded, systems, runs)


def model_path(name: str, args: argparse.Namespace, pythons: Mapping[str, str]) -> Path:
    """What a system loads, converted if need be."""
    form = SYSTEMS[name].format
    if form == "bundle":
        return Path(args.bundle)
    return Path(args.model) if form == "model" else converted(form, args.model, args.cache, pythons)


def report(
    args: argparse.Namespace, encoded: Mapping[str, Any], systems: Mapping[str, Any], runs: Mapping[str, Sequence[Run]]
) -> dict[str, Any]:
    """The numbers with what they depend on."""
    generated = [len(run.tokens) for done in runs.values() for run in done]
    return {
        "environment": {
            **measured_on(),
            "platform": platform.platform(),
        },
        "settings": {
            "decoding": "greedy",
            "dtype": "fp32",
            "batch": 1,
            "threads": args.threads,
            "prompts": len(encoded["prompts"]),
            "prompt_tokens": statistics.median(map(len, encoded["prompts"])),
            "generated_tokens": statistics.median(generated) if generated else None,
            "max_new_tokens": args.max_new_tokens,
            "repeats": args.repeats,
            "weights": fingerprint(args.model),
            "bundle_manifest_sha256": encoded["manifest_sha256"],
        },
        "systems": systems,
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
        default=list(DEFAULT_SYSTEMS),
        metavar="A,B",
        help=f"of {', '.join(SYSTEMS)}",
    )
    add("--prompts", type=Path, metavar="FILE", help="JSONL of prompts (default: the held-out prompts)")
    add("--count", type=positive_int, default=16, metavar="N", help="prompts to take (default 16)")
    add("--max-new-tokens", type=positive_int, default=128, metavar="N", help="longest answer (default 128)")
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


def interpreter(text: str) -> tuple[str, str]:
    """An argparse type: ``PATH`` or ``SYSTEM=PATH``."""
    name, separator, path = text.partition("=")
    name, path = (name, path) if separator else ("", text)
    if name not in {"", "optimum-intel", *SYSTEMS}:
        raise argparse.ArgumentTypeError(f"unknown system {name!r}; known: optimum-intel, {', '.join(SYSTEMS)}")
    if shutil.which(path) is None:
        raise argparse.ArgumentTypeError(f"{path!r} can't be run")
    return name, path


def default_output(cpu: str) -> Path:
    """Where results of a processor are kept."""
    return HERE / "results" / f"peers-{re.sub('[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit status."""
    args = parser().parse_args(argv)
    try:
        result = run_peers(args)
    except PeerError as error:
        say(f"error: {error}")
        return 1
    print(markdown(result))
    write_json(result, args.json or default_output(result["environment"]["cpu"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
