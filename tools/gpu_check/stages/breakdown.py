"""Splits a step's time without a profiler: its parts are captured and timed apart, and the host's share is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ..torch_reference.rig import Rig

_ROWS = (1, 16, 64)
_HOST_ROWS = (1, 64)


def run(options: Options, report: Report) -> None:
    """Put ``results[size]``.

    ``["rows"][rows]``: ms of each part over all layers. ``["host"]``: closed loops with and without waiting.
    """
    from ..torch_reference.rig import each_size

    each_size(options, report, _breakdown)


def _breakdown(rig: Rig, report: Report) -> None:
    from .sizes import timed_loop

    length = max(rig.shapes.lengths)
    entry: dict[str, Any] = {"dtype": rig.options.dtype, "length": length, "rows": {}, "host": {}, "notes": rig.notes}
    for rows in [rows for rows in _ROWS if rows in rig.options.rows]:
        report.check_time(20)
        whole = rig.time_step(rows, length)
        parts = _parts(rig, rows, length)
        # Heads aren't part of the whole. The rest is norms, rotary positions, mask, acceptance and gaps.
        inside = sum(ms for name, ms in parts.items() if not name.startswith("heads"))
        entry["rows"][str(rows)] = {"step": whole["ms"], **parts, "rest": whole["ms"] - inside, "way": whole["way"]}
        report.put(rig.size, entry)
    for rows in [rows for rows in _HOST_ROWS if rows in rig.options.rows]:
        for name, ahead in (("ahead", True), ("blocking", False)):
            report.check_time(10)
            loop = rig.loop(rig.best_way(rows, length), rows, length)
            entry["host"][f"{rows} row{'s' * (rows > 1)}, {name}"] = timed_loop(rig, loop, ahead=ahead)
            report.put(rig.size, entry)


def _parts(rig: Rig, rows: int, length: int) -> dict[str, float]:
    """Median ms of each part. Layers follow each other as in a step, so that weights come from memory."""
    import torch
    from torch.nn import functional

    from ..torch_reference.step import mlp, propose, write
    from ..torch_reference.weights import PROJECTIONS

    weights, model, repeats = rig.weights, rig.shapes.model, rig.options.repeats
    step = rig.ways[rig.best_way(rows, length)]
    loop = rig.loop(rig.best_way(rows, length), rows, length)
    inputs = loop.inputs

    def random(*size: int) -> Any:
        return torch.randn(size, dtype=weights.dtype, device=weights.device)

    x, attended = random(1, rows, model.hidden_size), random(1, rows, model.query_size)
    query, new = random(1, model.attention_heads, rows, model.head_dim), random(1, model.kv_heads, rows, model.head_dim)
    mask = torch.zeros(1, 1, rows, length, dtype=weights.dtype, device=weights.device)
    before = 0 if inputs.commit is None else step.margin
    targets = inputs.write_index[:, None] + torch.arange(-before, rows, device=weights.device)

    def write_all() -> None:
        for cache in rig.caches:
            write(cache, new, targets, inputs.commit)

    pairs = [rig.caches[index : index + 2] for index in range(0, len(rig.caches), 2)]
    works: dict[str, Callable[[], Any]] = {
        "attention": lambda: [step.attend(query, k[:, :, :length], v[:, :, :length], mask) for k, v in pairs],
        "projections": lambda: [
            (functional.linear(x, layer.qkv), functional.linear(attended, layer.out)) for layer in weights.layers
        ],
        "mlp": lambda: [mlp(x, layer.gate_up, layer.down) for layer in weights.layers],
        "cache writes": write_all,
        "vocabulary": lambda: functional.linear(x, weights.projection),
    }
    found = {name: rig.clock.measure(rig.clock.captured(work), repeats)["ms"] for name, work in works.items()}
    for kind in PROJECTIONS:
        heads = rig.heads(kind)
        for name, state in {"one row": x[:, 0], "all rows": x[0]}.items():
            if rows > 1 or name == "one row":
                work = rig.clock.captured(lambda state=state, heads=heads: propose(state, heads))  # type: ignore[misc]
                found[f"heads {kind}, {name}"] = rig.clock.measure(work, repeats)["ms"]
                del work  # frees its graph before the next capture
    return found
