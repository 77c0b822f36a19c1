"""Writes all graphs of a bundle from one trace of the step and one of the heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..runtime.files.manifest import cpu_twin
from .backbone.record import Backbone
from .heads.module import HeadStack
from .passes.lower import drop_closing, lower_cpu, lower_device, lower_standard
from .passes.pack import write_packed
from .quantise.cpu_heads import narrow_heads
from .quantise.screen import Rounded, screen
from .trace.failures import named_failures
from .trace.trace import trace_heads, trace_step
from .weights import WeightsFile

HEADS_GRAPH = "heads.onnx"
STANDARD_GRAPH = "step.onnx"


@named_failures("lowered")
def write_graphs(
    backbone: Backbone,
    stack: HeadStack,
    rows: int,
    capacity: int,
    folder: Path,
    report: Callable[[str], None],
    prefix: str = "",
    screened: Rounded | None = None,
) -> dict[str, str]:
    """Write every variant of the step, the heads, and the weights that no other file holds into ``folder``.

    ``rows``: of a cache. ``capacity``: tokens of a slot. ``prefix``: the start of their names. ``screened`` keeps the
    rounded projection from call to call. Returns the file name of each variant.
    """
    for_device = trace_step(backbone, stack, rows, capacity)
    standard = for_device.clone()
    drop_closing(standard)
    for_cpu = standard.clone()
    lower_device(for_device)
    lower_standard(standard)
    lower_cpu(for_cpu)
    shared = stack.shared is not None
    narrow_heads(for_cpu, shared=shared)
    screen(for_cpu, screened)
    graphs = {"standard": standard, "cpu": for_cpu, "device": for_device}
    names = {"standard": f"{prefix}{STANDARD_GRAPH}", "cpu": f"{prefix}step.cpu.onnx", "device": f"{prefix}step.device.onnx"}
    report("writing graphs")
    with WeightsFile(folder / f"{prefix}weights.bin") as weights:
        for name, graph in graphs.items():
            weights.save(graph, folder / names[name])
        heads = trace_heads(backbone, stack)
        heads_for_cpu = heads.clone()
        narrow_heads(heads_for_cpu, shared=shared)
        weights.save(heads, folder / f"{prefix}{HEADS_GRAPH}")
        weights.save(heads_for_cpu, folder / f"{prefix}{cpu_twin(HEADS_GRAPH)}")
    write_packed(folder / names["cpu"])
    return names


@named_failures("lowered")
def write_standard(backbone: Backbone, stack: HeadStack, rows: int, capacity: int, folder: Path) -> str:
    """Write the standard step and the heads alone, as :func:`write_graphs` does. Returns the step's file name."""
    standard = trace_step(backbone, stack, rows, capacity)
    drop_closing(standard)
    lower_standard(standard)
    with WeightsFile(folder / "weights.bin") as weights:
        weights.save(standard, folder / STANDARD_GRAPH)
        weights.save(trace_heads(backbone, stack), folder / HEADS_GRAPH)
    return STANDARD_GRAPH
