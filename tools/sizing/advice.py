"""Gives advice for a plan: the commands that come next, changes that make it fit, and the limits of its figures."""

from __future__ import annotations

from ...runtime.files.engine_record import OLDEST_TARGETS
from .capacity import WORKSPACE, Footprint, Heads, Limits, footprint
from .gpus import AHEAD_OF_TIME, GPUS, Gpu
from .source import Source


def commands_for(
    source: Source, precision: str, limits: Limits, rows: tuple[int, ...], weights: str, gpu: Gpu | None
) -> tuple[str, ...]:
    """List the commands to run next, in order. ``weights``: ``inside`` the engine or ``streamed``."""
    commands = []
    bundle = source.argument if source.kind == "bundle" else "BUNDLE"
    if source.kind != "bundle":
        linked = " --weights linked" if weights == "streamed" else ""
        commands.append(
            f"medusa-deploy export {source.argument} --heads HEADS -o BUNDLE --dtype fp16{linked} --capacity {limits.capacity} "
            f"--batch {limits.batch} --max-rows {limits.max_rows} --prefill-chunk {limits.prefill_chunk}"
        )
    if gpu is not None:
        target = f"--target {gpu.target}" if gpu.target in AHEAD_OF_TIME else "--backend tensorrt --target here"
        quantised = "" if precision == "fp16" else f" --precision {precision}"
        streamed = "" if weights == "inside" else f" --weights {weights}"
        commands.append(f"medusa-deploy build {bundle} {target}{quantised}{streamed} --rows {','.join(map(str, rows))}")
    return tuple(commands)


def notes_for(gpu: Gpu | None, taken: Footprint) -> tuple[str, ...]:
    """Tell how the figures were made, the memory that building takes, and what is unknown of this GPU."""
    notes = [f"workspace: {WORKSPACE}"]
    if taken.weights == "inside":
        needed = 2 * (taken.backbone + taken.heads) / 10**9
        notes.append(f"building takes about twice the weights in memory where it runs: {needed:.1f} GB")
    if gpu is None:
        return tuple(notes)
    notes.append("times: bytes ÷ published bandwidth, or operations ÷ published rate where that takes longer")
    if gpu.fp16 is None:
        notes.append(f"{gpu.name}: no dense fp16 rate is in the table, so times are bound by memory alone")
    if gpu.shared:
        notes.append(f"{gpu.name} shares its memory with the CPU: say with --reserve what the rest of the system needs")
    if gpu.target not in AHEAD_OF_TIME:
        notes.append(f"TensorRT-RTX doesn't build for {gpu.target}: build with the package tensorrt on that machine")
    return tuple(notes)


def suggestions_for(
    source: Source, heads: Heads, precision: str, limits: Limits, taken: Footprint, rows: tuple[int, ...], gpu: Gpu
) -> tuple[str, ...]:
    """Suggest how to make a plan fit: first changes of the plan, then GPUs that hold it as it is."""

    def fits(precision: str, limits: Limits) -> bool:
        return footprint(source.backbone, heads, precision, limits, len(rows) + 1, taken.reserve).total <= gpu.memory_bytes

    number = int(gpu.target.removeprefix("sm_"))
    others = [name for name in ("int8", "fp8", "int4") if number >= OLDEST_TARGETS[name]]
    found = []
    capacities = [n for n in (8192, 4096, 2048, 1024, 512) if n < limits.capacity]
    for tried in dict.fromkeys((precision, *others)):
        named = f"--precision {tried}"
        if tried != precision and fits(tried, limits):
            found.append(f"{named} fits")
            continue
        batch = next((n for n in range(limits.batch - 1, 0, -1) if fits(tried, limits.at(batch=n))), None)
        if batch is not None:
            found.append(f"{named} --batch {batch} fits")
            continue
        fitting = next((n for n in capacities if fits(tried, limits.at(n, 1))), None)
        if fitting is not None:
            found.append(f"{named} --batch 1 --capacity {fitting} fits")
    larger = [other for other in GPUS if other.memory_bytes >= taken.total]
    if larger:
        least = min(other.memory_gb for other in larger)
        found.append(f"with {least} GB it fits: {', '.join(other.name for other in larger if other.memory_gb == least)}")
    return tuple(found)
