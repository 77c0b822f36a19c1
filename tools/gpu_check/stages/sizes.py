"""Measures plain decoding with the torch reference: tokens/s of the closed loop, and bytes/s against the memory's own rate."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ..torch_reference.loop import Loop
    from ..torch_reference.rig import Rig

STEPS = 32


def run(options: Options, report: Report) -> None:
    """Put ``results["bandwidth"]`` and ``results[size]["lengths"][length]``."""
    from ..torch_reference.clock import Clock
    from ..torch_reference.rig import each_size

    bandwidth = Clock(options.device).bandwidth()
    report.put("bandwidth", bandwidth)
    each_size(options, report, lambda rig, report: _plain(rig, report, bandwidth["read_gb_s"]))


def _plain(rig: Rig, report: Report, read_gb_s: float) -> None:
    entry: dict[str, Any] = {"dtype": rig.options.dtype, "lengths": {}, "notes": rig.notes}
    for length in rig.shapes.lengths:
        report.check_time(15)
        way = rig.best_way(1, length)
        measured = timed_loop(rig, rig.loop(way, 1, length), ahead=True)
        rate = rig.step_bytes(length) / (1e6 * measured["wall_ms_per_step"])
        tokens_per_s = 1e3 / measured["wall_ms_per_step"]
        found = {"tokens_per_s": tokens_per_s, "gb_s": rate, "of_read_bandwidth": rate / read_gb_s, "way": way}
        entry["lengths"][length] = measured | found
        report.put(rig.size, entry)


def timed_loop(rig: Rig, loop: Loop, *, ahead: bool) -> dict[str, Any]:
    """Run ``STEPS`` steps as a program would, with the emitted tokens read by the host.

    The host reads each step before it starts the next, or (``ahead``) one step late. ``host_fraction`` is the share of the wall
    time in which the device had nothing to do.
    """
    import torch

    clock = rig.clock
    replay = clock.captured(loop.advance)
    hosts = [torch.empty_like(loop.emitted, device="cpu", pin_memory=clock.is_cuda) for _ in range(2)]
    done = [clock.event() for _ in range(2)] if clock.is_cuda else []

    def launch(step: int) -> None:
        replay()
        hosts[step % 2].copy_(loop.emitted, non_blocking=True)
        if done:
            done[step % 2].record()

    def read(step: int) -> int:
        if done:
            done[step % 2].synchronize()
        return sum(token >= 0 for token in hosts[step % 2][0].tolist())

    best: dict[str, Any] = {}
    for _ in range(3):
        rig.restart(loop, STEPS)
        clock.synchronize()
        started, tokens = time.perf_counter(), 0
        for step in range(STEPS):
            launch(step)
            if not ahead:
                tokens += read(step)
            elif step:
                tokens += read(step - 1)
        tokens += read(STEPS - 1) if ahead else 0
        wall = 1e3 * (time.perf_counter() - started) / STEPS
        if not best or wall < best["wall_ms_per_step"]:
            best = {"wall_ms_per_step": wall, "tokens_per_step": tokens / STEPS}
    device = clock.measure(replay, 10, lambda: rig.restart(loop))["ms"]
    return {**best, "device_ms_per_step": device, "host_fraction": max(0.0, 1 - device / best["wall_ms_per_step"])}
