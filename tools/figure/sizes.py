"""Draws models of several sizes: above, tokens/s of each by precision; below, tokens and cost of a step against size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .canvas import above, frame, picture
from .data import Bar, FigureData, Group
from .draw import COLOURS, SPEEDUPS, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR, _LEFT, _GAP = 0.54, 0.7, 0.75  # inches: a bar's place, margins left of axes
_UPPER, _LOWER, _HEAD, _BETWEEN = 2.6, 1.7, 0.9, 0.95
_LINES = ("-", "--", ":", "-.")


def draw_sizes(data: FigureData, kind: str) -> bytes:
    """Draw the figure and return the file's bytes; ``kind`` is ``svg`` or ``png``.

    Every model has axes of its own: a large one's tokens/s would be lines on the floor of a small one's.
    """
    models: dict[str, list[Group]] = {}
    for group in data.groups:
        models.setdefault(group.model, []).append(group)
    widths = [_BAR * (sum(len(group.bars) for group in groups) + len(groups)) for groups in models.values()]
    below = [*data.below, SPEEDUPS + " Tokens and cost of a step: means; cost in plain steps of the same precision."]
    width = sum(widths) + _LEFT + _GAP * (len(models) - 1) + 0.2
    foot = 0.75 + 0.17 * len(below)
    height = foot + _LOWER + _BETWEEN + _UPPER + _HEAD
    title = f"Decoding speed with and without Medusa on different model sizes: {', '.join(models)}"
    with picture(width, height, kind, below, title, describe(data)) as (figure, file):
        at, bottom = _LEFT, foot + _LOWER + _BETWEEN
        for number, (model, groups) in enumerate(models.items()):
            axes = figure.add_axes((at / width, bottom / height, widths[number] / width, _UPPER / height))
            named = _rates(axes, groups)
            axes.set_title(model, fontweight="bold", fontsize=11, y=1.01)
            if number == 0:
                axes.set_ylabel("tokens/s, decoding")
            at += widths[number] + _GAP
        every = {(bar.stage, bar.lookup): bar.label for group in data.groups for bar in group.bars}
        handles = {key: named.get(key) or _patch(COLOURS[key]) for key in every}
        figure.legend(
            [handles[key] for key in sorted(every)], [every[key] for key in sorted(every)], loc="upper left",
            bbox_to_anchor=(0.2 / width, 1 - 0.15 / height), ncols=len(every), frameon=False, fontsize=9,
            handlelength=1, handleheight=1, columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
        half = (width - _LEFT - _GAP - 0.2) / 2
        for number, (what, field) in enumerate((("Tokens a step", "tokens"), ("Cost of a step, plain steps", "cost"))):
            left = _LEFT + number * (half + _GAP)
            axes = figure.add_axes((left / width, foot / height, half / width, _LOWER / height))
            _against_size(axes, models, field, what)
    return file.getvalue()


def _rates(axes: Axes, groups: list[Group]) -> dict[tuple[int, bool], Any]:
    at, ticks, named = 0.0, [], {}
    for group in groups:
        first = at
        for bar in group.bars:
            named[bar.stage, bar.lookup] = axes.bar(at, bar.tokens_per_s, 0.86, color=COLOURS[bar.stage, bar.lookup])
            place = (at, bar.tokens_per_s)
            above(axes, place, 2, f"{bar.tokens_per_s:.1f}", quiet=True)
            if bar.stage:
                above(axes, place, 13, f"{bar.speedup:.2f}×")
            at += 1
        ticks.append(((first + at - 1) / 2, group.precision))
        at += 1
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(-1, at - 1)
    axes.set_ylim(0, 1.2 * max(bar.tokens_per_s for group in groups for bar in group.bars))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return named


def _against_size(axes: Axes, models: dict[str, list[Group]], field: str, what: str) -> None:
    """Draw a line for each way and precision over the models that have both."""
    precisions = list(dict.fromkeys(group.precision for groups in models.values() for group in groups))
    lines: dict[tuple[int, bool, str], list[tuple[int, float]]] = {}
    for place, groups in enumerate(models.values()):
        for group in groups:
            for bar in group.bars[1:]:
                lines.setdefault((bar.stage, bar.lookup, group.precision), []).append((place, _value(bar, field)))
    entries: dict[str, Any] = {}
    for (stage, lookup, precision), points in sorted(lines.items(), key=lambda line: precisions.index(line[0][2])):
        style = _LINES[precisions.index(precision) % len(_LINES)]
        axes.plot(*zip(*points, strict=True), style, color=COLOURS[stage, lookup], marker="o", markersize=4, linewidth=1.6)
        entries.setdefault(precision, axes.plot([], [], style, color="#59636E", linewidth=1.6)[0])
    axes.set_xticks(range(len(models)), list(models))
    axes.set_xlim(-0.3, len(models) - 0.7)
    axes.set_ylim(1.0, None)
    frame(axes, what, [(line, name) for name, line in entries.items()], "right", 0.0, 1)


def _value(bar: Bar, field: str) -> float:
    value: float = getattr(bar, field)
    return value


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
