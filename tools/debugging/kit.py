"""Writes a kit: the network as it is built, inputs of real steps, what ONNX Runtime makes of them, and commands of polygraphy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layers import Marked, marked_tensors
from .results_file import write_inputs, write_results
from .steps import record_steps, run_network

if TYPE_CHECKING:
    from ...export.quantise.blocks import Moments
    from ...export.quantise.w8a8 import PrecisionOptions
    from ...runtime.files.bundle import Bundle
    from .results_file import Arrays

KIT_NAME, KIT_VERSION = "kit.json", 1
MODEL, INPUTS, EXPECTED, SAVED, SHAPES = "model/step.onnx", "inputs", "expected", "saved", "shapes"
RUNNER = "expected"
"""Name of the runner in polygraphy's files of expected outputs."""
_NEW_TOKENS = 24


def write_kit(
    bundle: Bundle,
    output: Path,
    *,
    target: str,
    precision: str,
    options: PrecisionOptions,
    moments: Mapping[str, Moments] | None,
    prompt: str | Sequence[int] | None,
    layers: bool,
    force: bool = False,
    report: Callable[[str], object] = lambda _phase: None,
) -> dict[str, Any]:
    """Write a kit for the engine of ``target`` to the folder ``output`` and return what it holds, as ``kit.json`` says it.

    ``prompt``: text or token ids whose steps are recorded; None takes a question, or a few ids where there is no tokenizer.
    ``layers``: expected outputs hold the results of every product and attention, too. A kit is a folder or nothing.

    Raises:
        MissingDependencyError: polygraphy isn't installed.
        UsageError, ScalesError, QuantisationError: the network can't be made of this bundle.
        BundleExistsError, OutputError: the folder can't be written.
    """
    from ..extras import require

    require("debug")
    from ...export.engines.network import network_source
    from ...export.quantise.engine_weights import QuantisationReport, write_quantised
    from ...export.weights import WeightsFile, read_graph
    from ...runtime.files.bundle import staged_folder

    with staged_folder(output, force=force) as staging:
        for name in ("model", INPUTS, EXPECTED, SAVED, SHAPES, "scratch"):
            (staging / name).mkdir()
        network, scratch = staging / MODEL, staging / "scratch"
        report(f"making the {precision} network")
        with (
            network_source(bundle, precision, "inside", scratch, options, moments) as source,
            WeightsFile(network.with_name("weights.bin")) as file,
        ):
            write_quantised(source.step, network, file, lambda _model: QuantisationReport(0, 0, 0))
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()
        marked = marked_tensors(read_graph(network))
        report("recording steps")
        steps = record_steps(bundle, network, prompt, _NEW_TOKENS)
        names = [entry.tensor for entry in marked if layers or entry.place == "output"]
        for step, feeds in steps.items():
            report(f"expected outputs of {step}")
            _save(staging, step, feeds, run_network(network, feeds, names))
        facts = _facts(bundle, target, precision, marked, steps, layers=layers)
        (staging / "commands.sh").write_text(_commands(steps, names if layers else []), "utf-8")
        (staging / "commands.sh").chmod(0o755)
        (staging / KIT_NAME).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return facts


def _save(kit: Path, step: str, feeds: Arrays, found: Arrays) -> None:
    write_inputs(kit / INPUTS / f"{step}.json", [feeds])
    write_results(kit / EXPECTED / f"{step}.json", RUNNER, found)
    shapes = [f"{name}:[{','.join(map(str, value.shape))}]" for name, value in feeds.items()]
    (kit / SHAPES / f"{step}.txt").write_text(" ".join(shapes) + "\n", "utf-8")


def _facts(
    bundle: Bundle, target: str, precision: str, marked: Sequence[Marked], steps: Mapping[str, Any], *, layers: bool
) -> dict[str, Any]:
    import importlib.metadata

    from ... import __version__
    from ...runtime.files.manifest import Manifest
    from ...runtime.files.scales_file import model_digest

    manifest: Manifest = bundle.manifest
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "polygraphy")}
    return {
        "kit_version": KIT_VERSION,
        "target": target,
        "precision": precision,
        "model_sha256": model_digest(manifest),
        "steps": list(steps),
        "layers": layers,
        "marked": [asdict(entry) for entry in marked],
        "versions": {"medusa-deploy": __version__, **versions},
    }


def _commands(steps: Mapping[str, Any], outputs: Sequence[str]) -> str:
    """Write the commands for the machine with the GPU. ``outputs``: tensors that every run saves, beside the graph's own."""
    lines = [
        "#!/bin/sh",
        "# Run in this folder on the machine with the GPU:  ./commands.sh            all of it",
        "#                                                  ./commands.sh tree       one step",
        "# Needs: pip install polygraphy tensorrt-rtx onnxruntime onnx onnx-graphsurgeon",
        "set -u",
        'export POLYGRAPHY_USE_TENSORRT_RTX="${POLYGRAPHY_USE_TENSORRT_RTX-1}"  # 0: the package tensorrt',
        'RUNNER="${RUNNER---trt}"  # --onnxrt tries the commands on a machine without a GPU',
        f'STEPS="${{*:-{" ".join(steps)}}}"',
        "",
        f"polygraphy inspect model {MODEL}",
        "for step in $STEPS; do",
        f'  shapes=$(cat "{SHAPES}/$step.txt")',
        '  if [ "$RUNNER" = --trt ]; then',
        '    set -- --trt --trt-min-shapes $shapes --trt-opt-shapes $shapes --trt-max-shapes $shapes',
        *([f"    set -- \"$@\" --trt-outputs {' '.join(outputs)}"] if outputs else []),
        "  else",
        '    set -- "$RUNNER"',
        *([f"    set -- \"$@\" --onnx-outputs {' '.join(outputs)}"] if outputs else []),
        "  fi",
        f'  polygraphy run {MODEL} "$@" --load-inputs "{INPUTS}/$step.json" \\',
        f'    --load-outputs "{EXPECTED}/$step.json" --save-outputs "{SAVED}/$step.json" --atol 0.05 --rtol 0.05',
        "done",
        "",
        "# Then, where medusa-deploy is:  medusa-deploy debug --compare KIT",
        "# The smallest graph that still fails. Each try writes polygraphy_debug.onnx and runs what stands behind --check.",
        "#   polygraphy run model/step.onnx --onnxrt --onnx-outputs mark all --load-inputs inputs/tree.json \\",
        "#     --save-outputs golden.json",
        "#   polygraphy data merge inputs/tree.json golden.json -o layerwise.json",
        "#   polygraphy debug reduce model/step.onnx -o reduced.onnx --mode bisect --load-inputs layerwise.json \\",
        "#     --fail-regex 'Mismatched outputs' \\",
        '#     --check polygraphy run polygraphy_debug.onnx "$RUNNER" --load-inputs layerwise.json --load-outputs golden.json \\',
        "#     --atol 0.05 --rtol 0.05",
        "",
    ]
    return "\n".join(lines)
