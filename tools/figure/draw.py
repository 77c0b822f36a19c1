"""Draws a :class:`.data.FigureData`: bars of tokens/s on the left, parts of a step on the right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .canvas import INK, above, frame, picture
from .data import Bar, FigureData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart; a lighter tint without prompt lookup.
COLOURS = {(0, False): "#8C8C8C", (1, False): "#8CC8EC", (1, True): "#0072B2", (2, False): "#F2B08A", (2, True): "#D55E00"}
_PARTS = (("backbone", "backbone, one row", "#8C8C8C"), ("added", "more rows and heads", "#009E73"), ("host", "host", "#E69F00"))
SPEEDUPS = "Speed-ups are against plain decoding in the same run."
_BETWEEN = 1.8  # inches between the panels: names of steps stand there


def draw(data: FigureData, kind: str) -> bytes:
    """Draw the figure and return the file's bytes; ``kind`` is ``svg`` or ``png``."""
    bars = sum(len(group.bars) for group in data.groups)
    steps = sum(len(group.steps) for group in data.groups)
    below = [*data.below, SPEEDUPS + " Parts of a step: the median step, split by measured shares."]
    if any(_differs(bar, group.bars[0]) for group in data.groups for bar in group.bars):
        below.append("Dotted: plain decoding in that bar's own run.")
    legend_rows = 1 + (len({(bar.stage, bar.lookup) for group in data.groups for bar in group.bars}) > 3)
    rates = max(4.1 if legend_rows == 1 else 5.2, 0.62 * bars)
    # In inches, so that text of a fixed size always finds its place.
    width, foot, head = 0.7 + rates + _BETWEEN + 2.85 + 0.2, 0.75 + 0.17 * len(below), 0.62 + 0.2 * legend_rows
    body = max(2.1, 0.62 * steps)
    height = foot + body + head
    title = f"Decoding speed with and without Medusa: {', '.join(group.name for group in data.groups)}"
    with picture(width, height, kind, below, title, describe(data)) as (figure, file):
        left = figure.add_axes((0.7 / width, foot / height, rates / width, body / height))
        right = figure.add_axes(((0.7 + rates + _BETWEEN) / width, foot / height, 2.85 / width, body / height))
        _rates(left, data, legend_rows)
        _steps(right, data, legend_rows)
    return file.getvalue()


def _rates(axes: Axes, data: FigureData, legend_rows: int) -> None:
    at, ticks = 0.0, []
    named: dict[tuple[int, bool], tuple[Any, str]] = {}
    for group in data.groups:
        first = at
        for bar in group.bars:
            drawn = axes.bar(at, bar.tokens_per_s, 0.82, color=COLOURS[bar.stage, bar.lookup], label=bar.label)
            named.setdefault((bar.stage, bar.lookup), (drawn, bar.label))
            if bar.stage:
                above(axes, (at, bar.tokens_per_s), 13, f"{bar.speedup:.2f}×")
            above(axes, (at, bar.tokens_per_s), 2, f"{bar.tokens_per_s:.1f}", quiet=True)
            if _differs(bar, group.bars[0]):
                axes.hlines(bar.plain_tokens_per_s, at - 0.41, at + 0.41, color=INK, linestyle=":", linewidth=1.2)
            at += 0.94
        ticks.append(((first + at - 0.94) / 2, group.name))
        at += 0.6
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontweight="bold")
    spare = max(0.0, 4.4 - at) / 2  # a few bars needn't be fat
    axes.set_xlim(-0.75 - spare, at - 0.8 + spare)
    axes.set_ylim(0, 1.24 * max(bar.tokens_per_s for group in data.groups for bar in group.bars))
    axes.set_ylabel("tokens/s, decoding")
    frame(axes, "How fast", [named[key] for key in sorted(named)], "left", 0.0, legend_rows)


def _differs(bar: Bar, plain: Bar) -> bool:
    """Tell whether a bar's own run had another plain rate than the one drawn, by more than noise. The bar then gets a mark."""
    return abs(bar.plain_tokens_per_s / plain.tokens_per_s - 1) > 0.02


def _steps(axes: Axes, data: FigureData, legend_rows: int) -> None:
    longest = max(step.total for group in data.groups for step in group.steps)
    labels, at, named = [], 0.0, {}
    for group in data.groups:
        for step in group.steps:
            start = 0.0
            for field, label, colour in _PARTS:
                width = getattr(step, field)
                named[field] = (axes.barh(at, width, 0.58, left=start, color=colour), label)
                if width > 0.1 * longest:
                    axes.text(start + width / 2, at, f"{width:.1f}", ha="center", va="center", color="#FFFFFF", fontweight="bold")
                start += width
            tokens = "1 token" if step.tokens == 1 else f"{step.tokens:.2f} tokens"
            axes.text(start + 0.015 * longest, at, f"{step.total:.1f} ms\n{tokens}", va="center", fontsize=9, linespacing=1.3)
            name = step.label.replace(" + ", "\n+ ")
            labels.append((at, f"{group.name}\n{name}" if len(data.groups) > 1 and step is group.steps[0] else name))
            at += 1
        at += 0.4
    axes.set_yticks([place for place, _ in labels], [label for _, label in labels], color=INK)
    axes.set_ylim(at - 0.8, -0.6)
    axes.set_xlim(0, 1.36 * longest)
    axes.set_xlabel("ms a step")
    frame(axes, "Where the time goes", [named[field] for field, _, _ in _PARTS], "bottom", -1.2 / 2.85, legend_rows)


def describe(data: FigureData) -> str:
    """Describe the figure in words, a line for each bar and step: for stdout, and for those who can't see it."""
    lines = []
    for group in data.groups:
        lines.append(f"{group.name} ({group.precision} · {group.settings})")
        lines += [f"{bar.label}: {bar.tokens_per_s:.1f} tokens/s, {bar.speedup:.2f}×" for bar in group.bars]
        lines += [
            f"{step.label}: {step.total:.1f} ms a step (backbone {step.backbone:.1f}, more rows and heads {step.added:.1f}, "
            f"host {step.host:.1f}), {step.tokens:.2f} tokens"
            for step in group.steps
        ]
        lines += group.notes
    return "\n".join(lines)
