"""Describes a calibration in words and as records: the activations that int8 suits least, and the effect of smoothing."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from ...runtime.files.scales_file import GRIDS, Scales
from ..console import table


def worst(scales: Scales, count: int = 10) -> list[dict[str, object]]:
    """Activations that lose the largest shares of their values to 0, each with one of the layers that read it."""
    readers = {layer.activation: name for name, layer in reversed(list(scales.layers.items()))}
    order = sorted(scales.activations.items(), key=lambda item: -item[1].zeroed)[:count]
    return [
        {
            "activation": name,
            "layer": readers[name],
            "largest": entry.largest,
            "scale": entry.scale,
            "clipped": entry.clipped,
            "zeroed": entry.zeroed,
            "relative_error": entry.relative_error,
        }
        for name, entry in order
    ]


def smoothed(scales: Scales) -> dict[str, dict[str, object]]:
    """Effect of smoothing, by grid.

    Each grid counts activations by alpha, and holds the mean error of their products without factors and with them.
    """
    result: dict[str, dict[str, object]] = {}
    for grid in GRIDS if scales.smoothing else ():
        entries = [grids[grid] for grids in scales.smoothing.values()]
        counts = Counter("off" if entry.alpha is None else f"{entry.alpha:g}" for entry in entries)
        before, after = (fmean(getattr(entry, name) for entry in entries) for name in ("unsmoothed_error", "error"))
        result[grid] = {"activations": dict(sorted(counts.items())), "unsmoothed_error": before, "error": after}
    return result


def describe(scales: Scales) -> str:
    """Write counts, then the worst activations, one a line."""
    facts = scales.provenance
    headline = (
        f"{len(scales.activations)} activations of {len(scales.layers)} layers, method {scales.method}, from "
        f"{facts['prompts']} prompts: {facts['prefill_rows']} prefill rows and {facts['tree_rows']} tree rows"
    )
    if facts.get("layer_by_layer"):
        cut = f", {facts['cut_texts']} cut to {facts['longest_text']} tokens" if facts["cut_texts"] else ""
        headline += f"\nlayer by layer ({facts['why_layer_by_layer']}): prompts were read and not answered{cut}"
    rows = [
        [
            entry["activation"],
            entry["layer"],
            entry["largest"],
            entry["scale"],
            f"{entry['clipped']:.3%}",
            f"{entry['zeroed']:.1%}",
            f"{entry['relative_error']:.1%}",
        ]
        for entry in worst(scales)
    ]
    shown = f"{headline}\n\n{table(rows, ['activation', 'read by', 'largest', 'scale', 'clipped', 'zeroed', 'rms error'])}"
    for grid, entry in smoothed(scales).items():
        counts = ", ".join(f"{count} of alpha {alpha}" for alpha, count in entry["activations"].items())  # type: ignore[attr-defined]
        shown += (
            f"\n\nsmoothing, {grid} grid: {counts}\n"
            f"mean squared error of their products {entry['unsmoothed_error']:.2e} without, {entry['error']:.2e} with"
        )
    return shown
