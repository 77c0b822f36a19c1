"""``medusa-deploy plan``: which size fits on which GPU, its memory, its top speed, and the commands to run next."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import add_json_argument, positive_int

if TYPE_CHECKING:
    from ..sizing.deployment import DeploymentPlan, Fit

HELP = "plan a deployment: memory, bounds on speed and commands, for a known size, a model or a bundle"
_PUBLISHED = {"wp": "white paper", "ds": "data sheet"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--size", metavar="NAME", help="a known size, such as 13b or smollm2-135m")
    what.add_argument("--model", type=Path, metavar="MODEL", help="a model that export reads; its weights aren't loaded")
    what.add_argument("--bundle", type=Path, metavar="BUNDLE", help="a bundle, with its own heads and limits")
    what.add_argument("--list", action="store_true", help="print the known sizes and GPUs")
    parser.add_argument("--gpu", metavar="NAME", help='such as "RTX 4090" or "orin nx 16gb" (default: none, bytes only)')
    parser.add_argument("--precision", choices=("fp16", "int8", "int4", "fp8"), default="fp16", help="of weights (default: fp16)")
    parser.add_argument("--capacity", type=positive_int, metavar="N", help="tokens a slot holds (default: the size's)")
    parser.add_argument("--batch", type=positive_int, metavar="N", help="slots (default: 1, or the bundle's)")
    parser.add_argument("--rows", type=_numbers, metavar="N,…", help="sizes of a step (default: the size's)")
    parser.add_argument("--heads", metavar="FORM", help="own, shared, pruned:TOKENS or a folder of train (default: the bundle's)")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE", help="report of bench --sweep: adds the speed-up to expect from the folder of heads"
    )
    parser.add_argument("--num-heads", type=positive_int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--head-kind", choices=("medusa", "grounded"), default="medusa", help="form of the heads' blocks")
    parser.add_argument("--context", type=int, metavar="N", help="tokens in each slot for times (default: half the capacity)")
    parser.add_argument("--acceptance", type=float, metavar="LENGTH", help="mean acceptance length that bench measured")
    parser.add_argument(
        "--reserve", type=float, default=1.0, metavar="GIB", help="memory left to the system and the driver (default: 1, assumed)"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Returns 1 when the plan doesn't fit."""
    from ..console import emit
    from ..sizing.deployment import GIB, plan_deployment

    if args.list:
        emit(tables_text(), tables(), args.json)
        return 0
    names = ("size", "model", "bundle", "gpu", "precision", "capacity", "batch", "rows", "heads", "num_heads", "head_kind")
    options = {name: getattr(args, name) for name in (*names, "context", "acceptance", "bench")}
    plan = plan_deployment(**options, reserve=int(args.reserve * GIB))
    emit(plan_text(plan), {**asdict(plan), "fits": plan.fits}, args.json)
    return 0 if plan.fits else 1


def tables() -> dict[str, object]:
    """Both tables as records."""
    from ..sizing.gpus import GPUS
    from ..sizing.model_sizes import PRESETS

    return {"sizes": [preset.report() for preset in PRESETS], "gpus": [asdict(gpu) for gpu in GPUS]}


def tables_text() -> str:
    """Write both tables for a person."""
    from ..console import table
    from ..sizing.gpus import GPUS
    from ..sizing.model_sizes import PRESETS

    sizes = [
        [preset.name, f"{preset.parameters / 1e9:.2f}", shape.layers, shape.hidden_size,
         shape.intermediate_size,
         f"{shape.attention_heads}/{shape.kv_heads}", shape.head_dim, shape.vocab_size, shape.max_position,
         preset.capacity, ",".join(map(str, preset.rows)), " ".join(preset.aliases)]
        for preset in PRESETS for shape in [preset.shape]
    ]  # fmt: skip
    headers = ["size", "10⁹ parameters", "layers", "hidden", "inner", "heads/kv", "head", "vocabulary", "positions"]
    gpus = [
        [gpu.name, gpu.target, gpu.memory_gb, gpu.bandwidth, _rate(gpu.fp16), _rate(gpu.int8), _PUBLISHED[gpu.source]]
        for gpu in GPUS
    ]
    return "\n\n".join(
        [
            table(sizes, [*headers, "capacity", "rows", "also"]),
            table(gpus, ["GPU", "target", "GB", "GB/s", "fp16 TFLOPS", "int8 TOPS", "from"]),
        ]
    )


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def plan_text(plan: DeploymentPlan) -> str:
    """Write the plan for a person."""
    from ..console import facts

    limits, heads = plan.limits, plan.heads
    draft = f" over {heads.draft_vocab_size} tokens" if heads.projection == "pruned" else ""
    summary = {
        "backbone": f"{plan.name}, {plan.parameters:,} parameters, {plan.precision}",
        "heads": f"{heads.num_heads} {heads.kind}, {heads.projection} projection{draft}",
        "limits": f"{limits.batch} × {limits.capacity} tokens, steps of {', '.join(map(str, plan.rows))} rows, "
        f"prefill chunk {limits.prefill_chunk}",
    }
    if plan.fit is not None:
        gpu = plan.fit.gpu
        rate = "" if gpu.fp16 is None else f", {gpu.fp16:g} TFLOPS fp16"
        summary["GPU"] = f"{gpu.name}, {gpu.target}: {gpu.memory_gb} GB, {gpu.bandwidth:g} GB/s{rate} ({_PUBLISHED[gpu.source]})"
    parts = [facts(summary), _memory_text(plan), _precisions_text(plan)]
    if plan.fit is not None:
        parts += [_fit_text(plan, plan.fit), _speed_text(plan)]
    if plan.expected:
        parts.append(_expected_text(plan))
    parts += [_heads_text(plan), "next:\n" + "\n".join(f"  {command}" for command in plan.commands)]
    return "\n\n".join([*parts, "\n".join(textwrap.fill(f"note: {note}", 120, subsequent_indent="  ") for note in plan.notes)])


def _memory_text(plan: DeploymentPlan) -> str:
    from ..console import human_bytes, table

    taken = plan.bytes
    tied = "the embedding's memory: tied" if not taken.parts["vocabulary projection"] else ""
    smallest, largest = (human_bytes(size) for size in plan.plan_bytes)
    inside = taken.weights == "inside"
    file = f"weights inside: the plan takes {smallest} to {largest}" if inside else "weights streamed from the bundle's files"
    rows = [
        *([name, human_bytes(size), tied if name == "vocabulary projection" else ""] for name, size in taken.parts.items()),
        ["heads", human_bytes(taken.heads), ""],
        ["KV caches", human_bytes(taken.cache),
         f"{human_bytes(plan.cache_bytes_per_token)} a token, {human_bytes(plan.cache_bytes_per_slot)} a slot"],
        ["workspace", human_bytes(taken.workspace), "estimate, at most"],
        ["engine", human_bytes(taken.engine), f"estimate, at most, beyond the weights; {file}"],
        ["reserve", human_bytes(taken.reserve), "assumed: --reserve"],
        ["total", human_bytes(plan.total), ""],
    ]  # fmt: skip
    return table(rows, ["memory", "size", ""])


def _precisions_text(plan: DeploymentPlan) -> str:
    from ..console import human_bytes, table
    from ..sizing.capacity import MEMORIES

    rows = [
        [precision, human_bytes(total), *("yes" if total <= size * 10**9 else "" for size in MEMORIES)]
        for precision, total in plan.totals.items()
    ]
    return table(rows, ["precision", "total", *(f"in {size} GB" for size in MEMORIES)])


def _fit_text(plan: DeploymentPlan, fit: Fit) -> str:
    from ..console import human_bytes

    if fit.left < 0:
        lines = [f"does not fit: {human_bytes(-fit.left)} too much for {fit.gpu.name}"]
        weights = plan.bytes.backbone + plan.bytes.heads
        if weights > fit.gpu.memory_bytes:
            lines.append(f"the weights alone are {human_bytes(weights - fit.gpu.memory_bytes)} too much")
    else:
        held = f"{human_bytes(fit.gpu.memory_bytes)} ({fit.gpu.memory_gb} GB, as 10⁹ bytes)"
        lines = [f"fits: {human_bytes(fit.left)} left of {held}"]
    if fit.largest_capacity:
        slots = "1 slot" if plan.limits.batch == 1 else f"{plan.limits.batch} slots"
        whole = ", all that the model attends to" if fit.largest_capacity == fit.positions else ""
        lines.append(f"largest capacity with {slots}: {fit.largest_capacity} tokens{whole}")
    if fit.largest_batches:
        lines.append("most slots: " + ", ".join(f"{batch} × {capacity} tokens" for capacity, batch in fit.largest_batches))
    return "\n".join([*lines, *(f"try: {suggestion}" for suggestion in plan.suggestions)])


def _speed_text(plan: DeploymentPlan) -> str:
    from ..console import human_bytes, table

    assert plan.plain is not None
    rows = [
        [f"{step.rows}{'' if index else ' (plain)'}", human_bytes(step.nbytes), f"{1e3 * step.seconds:.3g}", step.bound,
         f"{step.ratio:.3f}", "" if step.tokens_per_second is None else f"{step.tokens_per_second:.0f}"]
        for index, step in enumerate((plan.plain, *plan.steps))
    ]  # fmt: skip
    slots = f" of each of {plan.limits.batch} slots" if plan.limits.batch > 1 else ""
    return (
        f"estimates, bounds that no engine reaches, at {plan.context} tokens in a slot:\n"
        + table(rows, [f"rows{slots}", "bytes a step", "ms, at least", "bound by", "÷ plain", "tokens/s, at most"])
        + "\na Medusa step pays from a mean acceptance length of its ÷ plain"
    )


def _expected_text(plan: DeploymentPlan) -> str:
    from ..console import table
    from ..measure.hit_table import OVER_POSITIONS

    rows = [[each.rows, f"{each.ms:.2f}", f"{each.tokens_per_step:.2f}", f"{each.speedup:.2f}"] for each in plan.expected]
    best = max(plan.expected, key=lambda each: each.speedup)
    told = f"expect {best.speedup:.2f}× from {best.rows} rows" if best.rows > 1 else "no number of rows pays: train better heads"
    headers = ["rows", "ms a step, measured", "expected tokens a step", "speed-up"]
    return f"{table(rows, headers)}\n{told}; expected {OVER_POSITIONS}"


def _heads_text(plan: DeploymentPlan) -> str:
    from ..console import human_bytes, table

    rows = [
        [f"{entry.projection}, {entry.draft_vocab} tokens", human_bytes(entry.nbytes), human_bytes(entry.nbytes_read),
         *([] if entry.ratio is None else [f"{entry.ratio:.3f}"])]
        for entry in plan.heads_estimates
    ]  # fmt: skip
    headers = [f"{plan.heads.num_heads} heads with a projection that is", "memory", "read a step"]
    return table(rows, [*headers, *([] if plan.fit is None else [f"step of {plan.rows[-1]} rows ÷ plain (estimate)"])])


def _numbers(text: str) -> list[int]:
    return [positive_int(number) for number in text.split(",")]
