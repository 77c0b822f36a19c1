"""Counts bytes on the device: weights, caches, heads, what a captured step adds, and what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import Options
from ..report import Report

if TYPE_CHECKING:
    from ..torch_reference.rig import Rig

CAPACITY = 4096


def run(options: Options, report: Report) -> None:
    """Put ``results[size]``. Sizes of tensors are exact. On a GPU ``step_bytes`` is the rise of the allocator's peak."""
    from ..torch_reference.rig import each_size

    each_size(options, report, _memory)


def _memory(rig: Rig, report: Report) -> None:
    from ..torch_reference.rig import MARGIN
    from ..torch_reference.weights import PROJECTIONS, random_heads

    layers = [getattr(layer, name) for layer in rig.weights.layers for name in layer.__dataclass_fields__]
    tensors = [*layers, rig.weights.embedding, rig.weights.projection, rig.weights.norm]
    per_slot = rig.shapes.model.cache_bytes(CAPACITY, rig.itemsize)
    entry: dict[str, Any] = {
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
        "plain_step_reads_bytes": rig.step_bytes(0),
        f"cache_bytes_of_{CAPACITY}": per_slot,
        "heads_bytes": {},
    }
    for kind in PROJECTIONS:
        heads = random_heads(rig.weights, kind, count=MARGIN)
        own = heads.blocks.nbytes + heads.bias.nbytes + (0 if kind == "shared" else heads.projection.nbytes)
        entry["heads_bytes"][kind] = own
        del heads
    report.put(rig.size, entry)
    if rig.clock.is_cuda:
        report.put(rig.size, entry | _on_device(rig, per_slot))


def _on_device(rig: Rig, per_slot: int) -> dict[str, Any]:
    import torch

    rows, length = 64, max(rig.shapes.lengths)
    rig.best_way(rows, length)  # a trial's memory isn't a step's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rig.time_step(rows, length)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {
        "step_bytes": torch.cuda.max_memory_allocated() - before,
        "step_rows": rows,
        "free_bytes": free,
        "total_bytes": total,
        f"computed_more_slots_of_{CAPACITY}": free // per_slot,
    }
