"""``medusa-deploy quantise``: a variant of a bundle's graph with weights in 8 or 4 bits, put into the same bundle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..making.moments import MOMENT_PROMPTS
from ..making.variant import BITS

HELP = "add a variant of 8-bit or 4-bit weights to a bundle"
BLOCKS = (16, 32, 64, 128)
ROUNDINGS = ("gptq", "nearest")
_OF_CPU: dict[str, Any] = {"scales": None, "name": None, "bits": 8, "projection_bits": 8, "heads_bits": 8, "block": None}
_OF_CPU |= {"budget": None, "data": None, "samples": None, "rounding": "gptq", "threads": None}
"""Choices of the CPU's variants, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, non_negative, positive_int

    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle that the variant is put into")
    parser.add_argument(
        "--backend", choices=("cpu", "cuda"), default="cpu", help="cuda: the graph in fp16 as cuda-int8; no option but --force"
    )
    parser.add_argument("--scales", type=Path, metavar="FILE", help="what calibrate wrote: its smoothing is applied (advised)")
    parser.add_argument("--name", metavar="NAME", help="of the variant (default: cpu-int8 or cpu-int4)")
    parser.add_argument("--bits", type=int, choices=BITS, help="of the layers' weights (default: %(default)s)")
    parser.add_argument("--projection-bits", type=int, choices=BITS, help="onto the vocabulary (default: %(default)s)")
    parser.add_argument(
        "--heads-bits", type=int, choices=BITS, help="of heads that an older export left in 32 (default: %(default)s)"
    )
    parser.add_argument(
        "--block",
        type=int,
        choices=BLOCKS,
        help="inputs that share a scale, in every product (default: 128, in 4 bits 32, smaller where that doesn't divide a "
        "product's inputs; with scales, products that suit are in integers)",
    )
    parser.add_argument(
        "--budget",
        type=non_negative,
        metavar="NATS",
        help="the most that next-token distributions may diverge (mean KL): products that spoil most get more bits (minutes)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="prompts for --budget and for 4 bits (default: the package's training prompts)"
    )
    parser.add_argument(
        "--samples", type=positive_int, metavar="N", help=f"of them, for 4 bits (default: {MOMENT_PROMPTS} of the package's)"
    )
    parser.add_argument(
        "--rounding", choices=ROUNDINGS, help="of 4-bit weights; gptq takes minutes (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="engine threads (default: all cores)")
    parser.set_defaults(**_OF_CPU)
    parser.add_argument("--force", action="store_true", help="replace a variant of this name")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Quantise, and describe the products."""
    from ..extras import require

    require("calibrate")
    if args.backend == "cuda":
        return _run_cuda(args)
    from ...export.quantise.cpu import CpuPrecision
    from ..console import emit
    from ..making.variant import quantise

    precision = CpuPrecision(args.bits, args.projection_bits, args.heads_bits, args.block)
    report = quantise(
        args.bundle,
        args.scales,
        name=args.name,
        precision=precision,
        budget=args.budget,
        data=args.data,
        samples=args.samples,
        rounding=args.rounding,
        threads=args.threads,
        force=args.force,
    )
    emit(report_text(report), report, args.json)
    return 0


def _run_cuda(args: argparse.Namespace) -> int:
    """Quantise the standard graph for the backend cuda, which takes none of the choices that the CPU has.

    Raises:
        UsageError: names those that were given.
    """
    from ...runtime.errors import UsageError
    from ..console import emit
    from ..making.variant import quantise_for_cuda

    given = [f"--{name.replace('_', '-')}" for name, default in _OF_CPU.items() if getattr(args, name) != default]
    if given:
        raise UsageError(f"{', '.join(given)}: cuda-int8 has 8 bits, rounded to the nearest", hint="leave that out")
    report = quantise_for_cuda(args.bundle, force=args.force)
    emit(report_text(report), report, args.json)
    return 0


def report_text(report: Mapping[str, Any]) -> str:
    """Describe the variant that was made."""
    from ..console import facts, human_bytes

    products = ", ".join(f"{count} in {bits} bits" for bits, count in report["products"].items() if count)
    lines = {
        "variant": f"{report['variant']} ({report['file']})",
        "products": products,
        "weights": f"{human_bytes(report['bytes_before'])} to {human_bytes(report['bytes_after'])}",
    }
    if "smoothed" in report:
        lines["in integers"] = f"{report['integers']} of them, activations too"
        lines["smoothed"] = f"{report['smoothed']} activations" + ("" if report["scales"] else " (no scales were given)")
    if "budget" in report:
        lines["divergence"] = f"{report['divergence']:.4g} nats of {report['budget']:g}, at {report['positions']} positions"
        lines["kept"] = ", ".join(f"{name} ({bits})" for name, bits in report["kept"].items()) or "nothing needed more bits"
    backend = "" if "smoothed" in report else " --backend cuda"
    run = f"medusa-deploy bench {report['bundle']}{backend} --variant {report['variant']}"
    return f"{facts(lines)}\n\n{run}"
