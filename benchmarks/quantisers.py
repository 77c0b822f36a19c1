"""Compares our quantisation with that of libraries: the same calibration texts, judged on the same held-out answers of fp32.

Usage: ``python benchmarks/quantisers.py --model DIR --bundle DIR --scales FILE [--python MODELOPT_VENV/bin/python]``

Prints a Markdown table; writes the report where --json says. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantiser.judge import REFERENCE, Judge, Logits
from quantiser.onnx_libraries import METHODS, Graph, quantise

from medusa_deploy.calibration.int8.samples import read_samples
from medusa_deploy.runtime import load
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.scales_file import read_scales
from medusa_deploy.runtime.session import Session
from medusa_deploy.tools.console import Progress, names_among, positive_int, say, write_json
from medusa_deploy.tools.machine import measured_on
from medusa_deploy.tools.measure.probe import Probe
from medusa_deploy.tools.prompt_source import packaged_prompts

HERE = Path(__file__).resolve().parent
CALIBRATION_TOKENS, ANSWER_TOKENS = 64, 96


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table. :func:`measure` quantises ``what`` in the ``way`` of ``whose``, with ``details``."""

    what: str
    whose: str
    label: str
    way: str
    details: Mapping[str, Any]


_DOWN = ["down_proj"]
_W8A8, _W8, _W4 = "weights and activations in 8 bits", "weights in 8 bits", "weights in 4 bits"
_OURS, _ORT, _MODELOPT = "medusa-deploy", "onnxruntime.quantization", "nvidia-modelopt"
SYSTEMS = {
    "ours-w8a8": System(_W8A8, _OURS, "default", "w8a8", {"keep": None}),
    "ours-w8a8-down": System(_W8A8, _OURS, "down products kept", "w8a8", {"keep": _DOWN}),
    "ours-w8a8-all": System(_W8A8, _OURS, "nothing kept", "w8a8", {"keep": []}),
    "modelopt-smoothquant-down": System(
        _W8A8,
        _MODELOPT,
        "INT8_SMOOTHQUANT_CFG, down products kept",
        "modelopt",
        {"config": "INT8_SMOOTHQUANT_CFG", "keep": _DOWN},
    ),
    "modelopt-smoothquant": System(_W8A8, _MODELOPT, "INT8_SMOOTHQUANT_CFG", "modelopt", {"config": "INT8_SMOOTHQUANT_CFG"}),
    "modelopt-int8": System(_W8A8, _MODELOPT, "INT8_DEFAULT_CFG", "modelopt", {"config": "INT8_DEFAULT_CFG"}),
    "ort-static": System(_W8A8, _ORT, "quantize_static, outputs of products left", "onnxruntime", {"method": "static"}),
    "ort-static-down": System(
        _W8A8, _ORT, "quantize_static, outputs and down products left", "onnxruntime", {"method": "static-down"}
    ),
    "ort-static-outputs": System(_W8A8, _ORT, "quantize_static", "onnxruntime", {"method": "static-outputs"}),
    "ours-cpu-int8": System(_W8, _OURS, "cpu-int8", "quantise", {"bits": 8, "rounding": "nearest"}),
    "ort-8-bit": System(_W8, _ORT, "MatMulNBits, to the nearest", "onnxruntime", {"method": "8-bit-rtn"}),
    "modelopt-w8": System(_W8, _MODELOPT, "INT8_WEIGHT_ONLY_CFG, a channel", "modelopt", {"config": "INT8_WEIGHT_ONLY_CFG"}),
    "ours-4-bit": System(_W4, _OURS, "smoothed, GPTQ", "quantise", {"bits": 4, "rounding": "gptq"}),
    "ours-4-bit-nearest": System(_W4, _OURS, "smoothed, to the nearest", "quantise", {"bits": 4, "rounding": "nearest"}),
    "modelopt-awq": System(
        _W4, _MODELOPT, "INT4_AWQ_CFG, 8 texts", "modelopt", {"config": "INT4_AWQ_CFG", "in_blocks": True, "texts": 8}
    ),
    "modelopt-4-bit": System(
        _W4,
        _MODELOPT,
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "modelopt",
        {"config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "in_blocks": True},
    ),
    **{
        f"ort-4-bit-{name}": System(_W4, _ORT, label, "onnxruntime", {"method": f"4-bit-{name}"})
        for name, label in {"rtn": "to the nearest", "hqq": "HQQ", "k-quant": "k-quant", "gptq": "GPTQ"}.items()
    },
}


def judge_for(args: argparse.Namespace) -> Judge:
    """Make texts and reference once for a work folder: fp32's own greedy answers."""
    folder = args.work / "judge"
    if not (folder / REFERENCE).exists():
        session = load(args.bundle, variant="cpu", check_hashes=False, prefix_cache=False)
        calibration, texts = (
            [
                (prompt, list(session.generate(token_ids=prompt, max_new_tokens=tokens).token_ids))
                for prompt in read_samples(session, packaged_prompts(part), args.count, tokens)
            ]
            for part, tokens in (("train", CALIBRATION_TOKENS), ("heldout", ANSWER_TOKENS))
        )
        return Judge.write(folder, calibration, texts, of_session(session))
    return Judge.read(folder)


def of_session(session: Session) -> Logits:
    """Return a function that computes a text's logits with a session."""

    def logits(prompt: list[int], answer: list[int]) -> np.ndarray:
        fed, most = [prompt[-1], *answer[:-1]], session.max_rows
        with Probe(session) as probe:
            probe.restart(prompt[:-1])
            return np.concatenate([probe.chain_logits(fed[at : at + most]) for at in range(0, len(fed), most)])

    return logits


def measure(system: System, name: str, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """Quantise in one system's way and judge it."""
    ways: dict[str, Callable[..., tuple[Logits, dict[str, Any]]]] = {"w8a8": _w8a8, "quantise": _quantise, "onnxruntime": _onnx}
    if system.way == "modelopt":
        return _modelopt(args, **system.details)
    started = time.perf_counter()
    logits, facts = ways[system.way](args, judge, name, **system.details)
    seconds = time.perf_counter() - started
    return {**judge.of(logits), **facts, "seconds": seconds}


def _w8a8(args: argparse.Namespace, _judge: Judge, _name: str, keep: list[str] | None) -> tuple[Logits, dict[str, Any]]:
    from medusa_deploy.export.quantise.w8a8_variant import write_w8a8_variant

    bundle = open_bundle(args.bundle)
    scales = read_scales(args.scales, bundle.manifest)
    kept = None if keep is None else Graph(bundle).down if keep else []
    made = write_w8a8_variant(bundle, scales, kept, force=True)
    matmuls = made.manifest.provenance["quantised"]["int8"]["layers"]
    return of_session(load(args.bundle, variant="int8", check_hashes=False, prefix_cache=False)), {"products": matmuls}


def _quantise(args: argparse.Namespace, _judge: Judge, name: str, bits: int, rounding: str) -> tuple[Logits, dict[str, Any]]:
    from medusa_deploy.export.quantise.cpu import CpuPrecision
    from medusa_deploy.tools.making.variant import quantise as put

    precision = CpuPrecision(layers=bits, projection=32, heads=32, block=args.block)
    variant = f"cpu-{name.removeprefix('ours-').removeprefix('cpu-')}"
    report = put(args.bundle, args.scales, name=variant, precision=precision, rounding=rounding, samples=args.count, force=True)
    session = load(args.bundle, variant=variant, check_hashes=False, prefix_cache=False)
    return of_session(session), {"products": report["products"][str(bits)]}


def _onnx(args: argparse.Namespace, judge: Judge, name: str, method: str) -> tuple[Logits, dict[str, Any]]:
    assert method in METHODS
    graph = Graph(open_bundle(args.bundle))
    output = args.work / name / "step.onnx"
    quantise(graph, method, judge.calibration, output, args.block)
    return graph.logits(output), {"products": graph.matmuls - (len(graph.down) if method == "static-down" else 0)}


def _modelopt(
    args: argparse.Namespace, config: str, keep: Sequence[str] = (), *, in_blocks: bool = False, texts: int | None = None
) -> dict[str, Any]:
    if args.python is None:
        raise ValueError("give --python of an environment with nvidia-modelopt")
    command = [str(args.python), "-m", "quantiser.modelopt", str(args.work / "judge"), str(args.model), config]
    command += ["--block", str(args.block)] if in_blocks else []
    command += ["--keep", ",".join(keep)] if keep else []
    command += ["--texts", str(texts)] if texts is not None else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent / "src")))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """Write the table: best first for each ``what``."""
    lines = ["| | by | products | perplexity | KL, nats | same argmax |", "|---|---|---:|---:|---:|---:|"]
    for what in dict.fromkeys(system.what for system in SYSTEMS.values()):
        rows = [(SYSTEMS[name], found) for name, found in report["systems"].items() if SYSTEMS[name].what == what]
        lines += [f"| **{what}** | | | | | |"] if rows else []
        for system, found in sorted(rows, key=lambda row: row[1].get("kl_nats", np.inf)):
            if "failed" in found:
                lines.append(f"| {system.label} | {system.whose} | | {found['failed']} | | |")
                continue
            lines.append(
                f"| {system.label} | {system.whose} | {found['products']} | {found['perplexity_increase_percent']:+.2f} % "
                f"| {found['kl_nats']:.4f} ± {found['kl_error']:.4f} | {100 * found['argmax_agreement']:.1f} % |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every system that was asked for; one that fails is listed with the reason. Returns the exit status.

    The report is written after each; others that it holds already stay in it.
    """
    args = parser().parse_args(argv)
    systems: dict[str, Any] = json.loads(args.json.read_text("utf-8"))["systems"] if args.json.exists() else {}
    with Progress("texts and reference") as bar:
        judge = judge_for(args)
        bar.phase("systems", len(args.systems))
        for done, name in enumerate(args.systems, 1):
            try:
                systems[name] = measure(SYSTEMS[name], name, judge, args)
            except Exception as error:  # noqa: BLE001 - whatever a library raises is its entry
                systems[name] = {"failed": f"{type(error).__name__}: {error!s:.300}"}
                say(f"{name}: {systems[name]['failed']}")
            write_json(described(judge, args.block, systems), args.json)
            bar.update(done, name)
    print(markdown({"systems": systems}))
    return 0


def described(judge: Judge, block: int, systems: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report: the results, and what they depend on."""
    return {
        "environment": {
            **measured_on(),
            "versions": {module: __import__(module).__version__ for module in ("onnxruntime", "onnx", "numpy")},
        },
        "settings": {
            "calibration": {"texts": len(judge.calibration), "tokens": sum(len(a) + len(b) for a, b in judge.calibration)},
            "judged": {"texts": len(judge.texts), "tokens": sum(len(answer) for _, answer in judge.texts)},
            "block": block,
        },
        "systems": systems,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="quantisers.py", description=(__doc__ or "").split("\n", 1)[0])
    add = result.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="the backbone as a Hugging Face folder")
    add("--bundle", type=Path, required=True, metavar="DIR", help="the fp32 bundle exported from it; gets further variants")
    add("--scales", type=Path, required=True, metavar="FILE", help="what calibrate made of it, with as many --samples as --count")
    add("--systems", type=names_among("system", SYSTEMS), default=list(SYSTEMS), metavar="A,B", help=f"of {', '.join(SYSTEMS)}")
    add("--python", type=Path, metavar="PATH", help="Python with nvidia-modelopt")
    add("--count", type=positive_int, default=32, metavar="N", help="prompts to calibrate with, and to judge on (default 32)")
    add("--block", type=positive_int, default=32, metavar="N", help="inputs that share a scale of few bits (default 32)")
    add("--work", type=Path, default=Path("build/quantisers"), metavar="DIR", help="texts, graphs (default build/quantisers)")
    add("--json", type=Path, default=Path("build/quantisers.json"), metavar="OUT", help="report (default build/quantisers.json)")
    return result


if __name__ == "__main__":
    sys.exit(main())
