"""Draws small charts as inline SVG: bars and lines. The page's CSS sets the colours, so that one drawing suits light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 420, 230  # user units; about the pixels that a phone has, so that text is as large as the page's
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 8, 10, 40
_INNER = _WIDTH - _LEFT - _RIGHT
_DEEP = _HEIGHT - _TOP - _BOTTOM
_MOST_LABELS = 9

Format = Callable[[float], str]


class Series(NamedTuple):
    """One row of values. ``style`` is a class of the page's CSS; a value is None where there is none."""

    name: str
    style: str
    values: Sequence[float | None]


def percent(value: float) -> str:
    """Write ``0.25`` as ``25 %``."""
    return f"{100 * value:.3g} %"


def short(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}"


def bars(labels: Sequence[str], series: Sequence[Series], axis: str, form: Format = short) -> str:
    """Draw groups of bars, one group for each label. A bar's tooltip is its value."""
    top, ticks = _scale(value for each in series for value in each.values if value is not None)
    group = _INNER / max(1, len(labels))
    width = 0.8 * group / len(series)
    parts = []
    for place, each in enumerate(series):
        for index, value in enumerate(each.values):
            if value is not None:
                x = _LEFT + group * index + 0.1 * group + place * width
                tall = _DEEP * value / top
                told = escape(f"{labels[index]}: {each.name} {form(value)}")
                box = f'x="{x:.1f}" y="{_TOP + _DEEP - tall:.1f}" width="{max(width - 1, 0.5):.1f}" height="{tall:.1f}"'
                parts.append(f'<rect class="fill {each.style}" {box}><title>{told}</title></rect>')
    centres = [_LEFT + group * (index + 0.5) for index in range(len(labels))]
    return _chart([*_grid(top, ticks, form), *parts, *_below(labels, centres)], series, axis)


def lines(labels: Sequence[str], series: Sequence[Series], axis: str, form: Format = short, most: float | None = None) -> str:
    """Draw a line for each series, a point for each label.

    A missing value breaks the line. ``most`` sets the top of the scale.
    """
    top, ticks = _scale(value for each in series for value in each.values if value is not None)
    if most is not None:
        top, ticks = most, [most * quarter / 4 for quarter in range(5)]
    gap = _INNER / max(1, len(labels))
    places = [_LEFT + gap * (index + 0.5) for index in range(len(labels))]
    parts = []
    for each in series:
        run: list[str] = []
        dots = []
        for index, value in enumerate([*each.values, None]):
            if value is not None:
                x, y = places[index], _TOP + _DEEP * (1 - value / top)
                run.append(f"{x:.1f},{y:.1f}")
                told = escape(f"{labels[index]}: {each.name} {form(value)}")
                dots.append(f'<circle class="fill {each.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>{told}</title></circle>')
            elif run:
                parts.append(f'<polyline class="line {each.style}" points="{" ".join(run)}"/>')
                run = []
        parts += dots
    return _chart([*_grid(top, ticks, form), *parts, *_below(labels, places)], series, axis)


def _scale(values: Iterable[float]) -> tuple[float, list[float]]:
    """Top of a scale from 0, and its ticks, a round number apart."""
    largest = max(values, default=0.0)
    if not largest > 0:
        return 1.0, [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor * 4 >= largest * 0.999)
    count = math.ceil(largest / step * 0.999)
    return step * count, [step * index for index in range(count + 1)]


def _grid(top: float, ticks: Sequence[float], form: Format) -> list[str]:
    parts = []
    for tick in ticks:
        y = _TOP + _DEEP * (1 - tick / top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(form(tick))}</text>')
    return parts


def _below(labels: Sequence[str], places: Sequence[float]) -> list[str]:
    """Labels below the axis, as many as there is room for."""
    every = -(-len(labels) // _MOST_LABELS)
    return [
        f'<text x="{places[index]:.1f}" y="{_TOP + _DEEP + 15}" text-anchor="middle">{escape(labels[index])}</text>'
        for index in range(0, len(labels), max(1, every))
    ]


def _chart(parts: Sequence[str], series: Sequence[Series], axis: str) -> str:
    """The drawing, with the legend above it and the axis's name below."""
    keys = "".join(f'<span><i class="{each.style}"></i>{escape(each.name)}</span>' for each in series)
    name = f'<text x="{_LEFT + _INNER / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(axis)}</text>'
    told = escape(", ".join(each.name for each in series))
    drawing = "\n".join([*parts, name])
    return (
        f'<p class="legend">{keys}</p>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}, by {escape(axis)}">\n{drawing}\n</svg>'
    )
