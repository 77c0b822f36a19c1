"""Measures the executor ``cuda`` on a model that fills a GPU: a bundle of random weights, made here, in fp16 and int8."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ....runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, Wanted
from ....runtime.tree import Shape
from ..options import SCRATCH, Options
from ..report import OutOfTimeError, Report
from ..shapes import SIZES, Shapes

if TYPE_CHECKING:
    from ....runtime.executors.ort_cuda import OrtDeviceExecutor
    from ....runtime.files.bundle import Bundle

_TO_LOAD = {"fp16": 60.0, "int8": 35.0}
"""Seconds that must be left before a session is opened: guesses, for nothing of this size was loaded on a GPU."""


def run(options: Options, report: Report) -> None:
    """Put ``made``, ``memory`` (its rate), and ``results[precision]`` of the smallest size that was asked for."""
    from ..random_bundle import PRECISIONS, make_bundle

    size = options.sizes[0]
    shapes, folder = SIZES[size], options.out / SCRATCH / "cuda-7b"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        bundle, seconds = make_bundle(shapes, folder)
        report.put("made", {"size": size, "layers": shapes.model.layers, "seconds": seconds})
        _put_memory(options, report)
        # Captures come last, int8 first: each loads its graph again, and fp16 takes longest.
        for work, precisions in ((_measure, tuple(PRECISIONS)), (_try_captures, tuple(reversed(PRECISIONS)))):
            for precision in precisions:
                report.check_time(_TO_LOAD[precision] if options.device == "cuda" else 0.0)
                try:
                    work(bundle, precision, shapes, options, report)
                except OutOfTimeError:
                    raise
                except Exception as error:
                    report.skip(f"{precision}{'' if work is _measure else ', CUDA graph'}", error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_memory(options: Options, report: Report) -> None:
    """Put the published rate of the GPU's memory and the one that a read reaches here."""
    from ....runtime.errors import UsageError
    from ...sizing.gpus import find_gpu
    from ..machine import gpu_facts

    found: dict[str, Any] = {}
    name = next((facts["name"] for facts in gpu_facts()), None) if options.device == "cuda" else None
    try:
        found["published_gb_s"] = None if name is None else find_gpu(name).bandwidth
    except UsageError as error:
        report.skip("published rate of the memory", error)
    try:
        from ..torch_reference.clock import Clock

        found["read_gb_s"] = Clock(options.device).bandwidth()["read_gb_s"]
    except ImportError as error:
        report.skip("measured rate of the memory", error)
    report.put("memory", found)


def _measure(bundle: Bundle, precision: str, shapes: Shapes, options: Options, report: Report) -> None:
    """Put what the executor does in one precision, entry by entry."""
    entry: dict[str, Any] = {"rows": {}}
    with _opened(bundle, precision, options.device, entry) as executor:
        _put_placement(executor, entry, precision, report)
        length = _length(shapes, options)
        for rows in options.rows:
            report.check_time(5)
            found = _timed(executor, _plan(rows, length, shapes), options.repeats)
            if not found["finite"]:
                report.wrong[f"{precision}, {rows} rows"] = "a hidden state isn't finite"
            entry["rows"][str(rows)] = found | _bound(shapes, precision, rows, length, report.results["memory"])
            report.put(precision, entry)
        for rows in {1, max(options.rows)}:
            _put_profile(executor, _plan(rows, length, shapes), entry, f"{precision}, kernels of {rows} rows", options, report)
        report.put(precision, entry)
        del executor  # the next session needs the memory


@contextmanager
def _opened(bundle: Bundle, precision: str, device: str, entry: dict[str, Any]) -> Iterator[OrtDeviceExecutor]:
    """Load the executor, and leave its memory behind it. Notes the seconds that loading takes."""
    from ....runtime.backends import ort_model
    from ....runtime.executors.ort_cuda import OrtDeviceExecutor
    from ..random_bundle import PRECISIONS

    started = time.monotonic()
    executor = OrtDeviceExecutor(ort_model(bundle, 1, PRECISIONS[precision]), device)
    entry["load_s"] = round(time.monotonic() - started, 1)
    try:
        yield executor
    finally:
        del executor
        gc.collect()


def _put_placement(executor: OrtDeviceExecutor, entry: dict[str, Any], precision: str, report: Report) -> None:
    try:
        placed = executor.placement()
    except Exception as error:
        report.skip(f"{precision}, where nodes are", error)
        return
    entry["nodes"] = {provider: sum(by_operator.values()) for provider, by_operator in placed.items()}
    entry["on_cpu"] = placed.get("CPUExecutionProvider", {})


def _length(shapes: Shapes, options: Options) -> int:
    """Kept rows, behind which the largest step fits into the visible cache."""
    from ..random_bundle import HEADS

    return shapes.lengths[0] - max(options.rows) - HEADS


def _plan(rows: int, length: int, shapes: Shapes) -> StepPlan:
    """A root with children behind ``length`` kept rows; one row alone wants no heads."""
    tokens = np.arange(rows) % shapes.model.vocab_size
    active = SlotRows(0, tokens, Shape.of((-1, *[0] * (rows - 1))), 1, Wanted(heads=rows > 1))
    return StepPlan((active,), (length,), ((),))


def _timed(executor: OrtDeviceExecutor, plan: StepPlan, repeats: int) -> dict[str, Any]:
    """Time a plan: the median of ``repeats`` runs behind two that warm up, and the bytes that the executor copies in one."""
    walls, engine, copied, finite = [], [], 0, True
    for turn in range(2 + repeats):
        before, started = executor.copied_bytes, time.perf_counter()
        (found,) = executor.run(plan).slots
        taken = 1e3 * (time.perf_counter() - started)
        if not isinstance(found, SlotResult):
            raise found
        copied, finite = executor.copied_bytes - before, finite and found.finite
        if turn > 1:
            walls.append(taken)
            engine.append(1e3 * found.seconds)
    return {"ms": median(walls), "engine_ms": median(engine), "repeats": repeats, "finite": finite, "copied_bytes": copied}


def _bound(shapes: Shapes, precision: str, rows: int, length: int, memory: dict[str, Any]) -> dict[str, Any]:
    """Count the bytes that a step reads at least, and how long memory takes to deliver them.

    Heads count in plain steps, too: the standard graph runs them in every step.
    """
    from ...sizing.capacity import backbone_of, heads_of
    from ...sizing.gpus import Gpu
    from ...sizing.step_estimate import estimate_step
    from ..random_bundle import heads_config

    rate = memory.get("published_gb_s") or memory.get("read_gb_s")
    gpu = Gpu("here", "here", 0, rate or 1.0, None, None, "measured")
    model, heads = backbone_of(shapes.model), heads_of(heads_config(shapes))
    found = estimate_step(model, heads, gpu, precision=precision, rows=rows, batch=1, context=length)
    return {"bytes": found.nbytes, "bound_ms": 1e3 * found.seconds if rate else None}


def _put_profile(
    executor: OrtDeviceExecutor, plan: StepPlan, entry: dict[str, Any], name: str, options: Options, report: Report
) -> None:
    """Put the kernels of one step. A CPU has none."""
    from ..kernels import profiled

    if options.device != "cuda":
        report.skip(name, "no GPU runs any")
        return
    try:
        entry.setdefault("profile", {})[str(plan.active[0].count)] = profiled(lambda: executor.run(plan))
    except Exception as error:
        report.skip(name, error)


def _try_captures(bundle: Bundle, precision: str, shapes: Shapes, options: Options, report: Report) -> None:
    """Put ``cuda_graph``: whether steps are captured, and ms of a replayed one by rows; or why not."""
    from ....runtime.backends import ort_model
    from ..cuda_graph import CapturedSteps
    from ..random_bundle import PRECISIONS

    found: dict[str, Any] = {"captured": False, "reason": "a CPU has none; the calls were tried", "ms": {}}
    entry = report.results.get(precision, {}) | {"cuda_graph": found}
    try:
        steps = CapturedSteps(ort_model(bundle, 1, PRECISIONS[precision]), options.device)
        for rows in options.rows:
            found["ms"][str(rows)] = steps.milliseconds(_plan(rows, _length(shapes, options), shapes), options.repeats)
        if options.device == "cuda":
            found |= {"captured": True, "reason": None}
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        found["reason"] = " ".join(str(error).split())[:300]
    report.put(precision, entry)
