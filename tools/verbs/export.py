"""``medusa-deploy export``: a checkpoint and its heads to a bundle."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import add_json_argument, positive_int

if TYPE_CHECKING:
    from ...export.estimate import ExportPlan

HELP = "trace a checkpoint with its Medusa heads into a bundle, and check it against the torch module"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="folder of safetensors with config.json, a .gguf file, or org/name[@revision][:file.gguf] of a hub (default: the "
        "backbone that the heads name)",
    )  # fmt: skip
    heads = parser.add_mutually_exclusive_group(required=True)
    heads.add_argument(
        "--heads", metavar="HEADS", help="Medusa heads in any published layout: a folder, a file, or org/name of a hub"
    )
    heads.add_argument("--no-heads", action="store_true", help="export the backbone alone: it decodes plainly")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of weights and caches (default: fp32)")
    parser.add_argument(
        "--weights", choices=("auto", "linked", "copied"), default="auto",
        help="linked: the checkpoint's safetensors become the bundle's, and are never in memory as a whole; copied: the bundle "
        "has its own (default: auto, copied up to 1 GiB, and linked above where it can be)",
    )  # fmt: skip
    few = parser.add_argument_group("in few bits, for the CPU alone")
    few.add_argument(
        "--precision", choices=("int8", "int4"),
        help="calibrate and quantise, too, a layer at a time; the bundle holds that one graph, and no weights in 4 bytes",
    )  # fmt: skip
    few.add_argument("--data", type=Path, metavar="FILE", help="prompts to calibrate with (default: the package's)")
    few.add_argument("--samples", type=positive_int, metavar="N", help="of them (default: all of FILE, 64 of the package's)")
    few.add_argument("--rounding", choices=("gptq", "nearest"), help="of 4-bit weights; gptq takes longer (default: gptq)")
    parser.add_argument("--capacity", type=positive_int, default=2048, help="tokens a slot holds (default: 2048)")
    parser.add_argument("--batch", type=positive_int, default=1, help="slots at most (default: 1)")
    parser.add_argument(
        "--tree", type=Path, metavar="FILE", help="default tree: a JSON list of paths (default: that of the heads)"
    )
    parser.add_argument("--top-k", type=positive_int, default=10, help="candidates a head returns (default: 10)")
    parser.add_argument("--max-rows", type=positive_int, default=64, help="rows of the largest tree (default: 64)")
    parser.add_argument("--prefill-chunk", type=positive_int, default=256, help="prompt tokens a step (default: 256)")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written and how large; load no weights")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Export the bundle, or with ``--dry-run`` print the plan."""
    from ..console import Progress, emit, say, warn
    from ..extras import quiet_libraries, require

    require("export")
    quiet_libraries()
    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import refuse_existing
    from ..tree_set import read_tree_file

    refuse_existing(args.output, force=args.force)  # before torch is imported
    options = {name: getattr(args, name) for name in ("dtype", "weights", "capacity", "batch", "top_k", "max_rows")}
    options["tree"] = None if args.tree is None else read_tree_file(args.tree)
    few_bits = {name: getattr(args, name) for name in ("data", "samples", "rounding") if getattr(args, name) is not None}
    if few_bits and args.precision is None:
        raise UsageError(f"--{', --'.join(few_bits)} without --precision", hint="give --precision int8 or int4")
    if args.dry_run:
        from ...export.estimate import plan_export

        bits = None if args.precision is None else int(args.precision.removeprefix("int"))
        plan = plan_export(args.model, args.heads, **options, bits=bits)
        warn(plan.warnings)
        emit(plan_text(plan, args.output), {"output": args.output, "dry_run": True, **asdict(plan)}, args.json)
        return 0
    options |= {"prefill_chunk": args.prefill_chunk, "force": args.force}
    if args.precision is not None:
        from ..making.few_bits import export_few_bits

        report = export_few_bits(args.model, args.heads, args.output, args.precision, **few_bits, **options)
    else:
        from ...export.exporter import export_bundle

        with Progress("starting") as progress:
            report = export_bundle(args.model, args.heads, args.output, **options, report=progress)
    warn(report["warnings"])
    if args.no_heads:
        say("note: without heads this bundle decodes plainly")
    report["bytes"] = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    emit(report_text(report, args.output), {"output": args.output, **report}, args.json)
    return 0


def report_text(report: dict[str, Any], output: Path) -> str:
    """Describe what was measured: one line a variant, then the bundle."""
    from ..console import human_bytes, human_seconds, table

    rows = [
        [name, f"{check['max_logit_error']:.2e}", f"{check['logit_scale']:.1f}", f"{check['argmax_agreement']:.1%}",
         f"{check['head_agreement']:.1%}", check["rows"]]
        for name, check in report["check"].items()
    ]  # fmt: skip
    headers = ["variant", "max logit error", "largest logit", "argmax agreement", "head agreement", "rows"]
    checked = ""
    weights = report["weights"]
    if weights["kind"] == "linked":
        tensors = next(iter(weights["places"].values()))["tensors"]
        files = ", ".join(sorted(set(weights["files"].values())))
        ran = "all" if weights["checked_layers"] == weights["layers"] else f"the first {weights['checked_layers']} of"
        checked = (
            f"\nchecked: {ran} {weights['layers']} layers ran; the places of all {tensors} "
            f"weights hold the right tensors\nweights: {len(weights['files'])} files ({files})"
        )
    windows = next(iter(report["check"].values()))["windows"]
    if windows:
        checked += f"\nchecked: past windows of {', '.join(map(str, windows))} tokens"
    if report["adapter"] is not None:
        adapter = report["adapter"]
        checked += f"\nbackbone: the heads' adapter (rank {adapter['rank']}) is merged into it"
    if "quantised" in report:
        facts = report["quantised"]
        products = ", ".join(f"{count} in {bits} bits" for bits, count in facts["products"].items() if count)
        checked += f"\nquantised: {products}; {human_bytes(facts['bytes_before'])} to {human_bytes(facts['bytes_after'])}"
    return f"{table(rows, headers)}{checked}\n\n{output}  {human_bytes(report['bytes'])}  in {human_seconds(report['seconds'])}"


def plan_text(plan: ExportPlan, output: Path) -> str:
    """Write the plan of an export as a list."""
    from ..console import facts, human_bytes

    heads = f"{plan.num_heads}, {plan.head_parameters:,} parameters" if plan.num_heads else "none"
    return facts(
        {
            "backbone": f"{plan.architecture}, {plan.layers} layers, hidden {plan.hidden_size}, vocabulary {plan.vocab_size}",
            "parameters": f"{plan.parameters:,}",
            "heads": heads,
            "tree": f"{plan.tree_rows} rows, depth {plan.tree_depth}",
            "would write": f"{output}: about {human_bytes(plan.bundle_bytes)}",
            **({"of these linked": human_bytes(plan.linked_bytes)} if plan.linked_bytes else {}),
            "cache": f"{human_bytes(plan.cache_bytes_per_slot)} a slot, {human_bytes(plan.cache_bytes)} in all",
        }
    )
