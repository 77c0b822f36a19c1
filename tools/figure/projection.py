"""Draws a projection as a picture of its own: the measured overhead of a step (``gpu_check``) at a published acceptance.

Its bars never stand beside measured speed-ups. They are hatched, and the title calls them a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UsageError
from .canvas import above, frame, picture
from .reports import is_gpu_check

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Projection: acceptance published, not measured here"
ROWS = "64"
"""Rows of the tree whose acceptance was published."""
HINT = "give a gpu_check.json whose stage overhead ran on a GPU: python -m medusa_deploy.tools.gpu_check --stages overhead"

_COLOURS = {"own": "#56B4E9", "shared": "#009E73", "pruned": "#CC79A7"}


@dataclass(frozen=True, slots=True)
class ProjectedBar:
    """A step with heads of one ``kind`` of projection.

    ``overhead`` is that step ÷ a plain step, measured. ``speedup_if_so`` follows from it and the published acceptance.
    """

    kind: str
    overhead: float
    speedup_if_so: float


@dataclass(frozen=True, slots=True)
class ProjectedSize:
    """One model size on one GPU. ``tokens_per_step`` was published by ``source``."""

    name: str
    settings: str
    tokens_per_step: float
    source: str
    bars: tuple[ProjectedBar, ...]


@dataclass(frozen=True, slots=True)
class ProjectionData:
    """All sizes. ``notes`` name the sizes that were measured and aren't drawn, and why."""

    sizes: tuple[ProjectedSize, ...]
    notes: tuple[str, ...] = ()


def projection_data(reports: Mapping[Path, Any], labels: Mapping[Path, str] | None = None) -> ProjectionData:
    """Read the projections in reports of ``gpu_check`` by file. ``labels`` name machines; a file without one is named by its GPU.

    Raises:
        UsageError: a report of ``bench``, one without a projection, or one whose figures don't follow from each other.
    """
    labels = labels or {}
    for path in labels:
        if path not in reports:
            raise UsageError(f"{path} is none of the reports", hint=f"reports: {', '.join(map(str, reports))}")
    sizes: list[ProjectedSize] = []
    notes: list[str] = []
    for path, report in reports.items():
        if not is_gpu_check(report):
            raise UsageError(
                f"{path} is no report of gpu_check: what was measured isn't drawn with what was projected",
                hint="draw reports of bench by themselves, without --projection",
            )
        try:
            machine = labels.get(path) or report["machine"]["gpu"][0]["name"]
            entries = {size: entry for size, entry in report["stages"]["overhead"]["results"].items() if "heads" in entry}
            drawn = {size: _size(f"{size}, {machine}", entry) for size, entry in entries.items() if "projection" in entry}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UsageError(f"{path} holds no projection: {error!r}", hint=HINT) from None
        if not drawn:
            raise UsageError(f"{path} holds no projection", hint=HINT)
        sizes += drawn.values()
        notes += [f"{size}, {machine}: measured, but no acceptance is published for it." for size in entries if size not in drawn]
    return ProjectionData(tuple(sizes), tuple(notes))


def _size(name: str, entry: Mapping[str, Any]) -> ProjectedSize:
    found = entry["projection"]
    tokens, said = float(found["tokens_per_step"]), found["speedup_if_so"]
    if found["measured"] is not False:
        raise ValueError(f"{name}: a projection that says it was measured")
    bars = []
    for kind in _COLOURS:
        if kind not in said:
            continue
        overhead = float(entry["heads"][kind][ROWS]["overhead"])
        if not 0 < overhead < float("inf") or abs(tokens / overhead / float(said[kind]) - 1) > 1e-6:
            raise ValueError(f"{name}: {tokens} tokens ÷ {overhead} isn't {said[kind]}")
        bars.append(ProjectedBar(kind, overhead, float(said[kind])))
    if not bars:
        raise ValueError(f"{name}: no step of {ROWS} rows")
    settings = f"{entry['dtype']}, {entry['length']} tokens visible, a plain step {float(entry['plain']['ms']):.2f} ms"
    return ProjectedSize(name, settings, tokens, str(found["acceptance_source"]), tuple(bars))


def describe_projection(data: ProjectionData) -> str:
    """Describe the figure in words, a line for each bar."""
    lines = [TITLE]
    for size in data.sizes:
        lines.append(f"{size.name} ({size.settings})")
        lines += [
            f"{bar.kind} projections: {size.tokens_per_step:.2f} tokens a step, published ÷ {bar.overhead:.2f}, measured = "
            f"{bar.speedup_if_so:.2f}× if so"
            for bar in size.bars
        ]
    return "\n".join([*lines, *_below(data)])


def draw_projection(data: ProjectionData, kind: str) -> bytes:
    """Draw the figure and return the file's bytes; ``kind`` is ``svg`` or ``png``."""
    below = [f"{size.name}: {size.settings}" for size in data.sizes] + _below(data)
    width, foot, body, head = max(8.2, 1.1 + 0.95 * sum(len(size.bars) + 0.6 for size in data.sizes)), 0.55, 2.6, 0.82
    foot += 0.17 * len(below)
    height = foot + body + head
    title = f"{TITLE}: {', '.join(size.name for size in data.sizes)}"
    with picture(width, height, kind, below, title, describe_projection(data)) as (figure, file):
        _bars(figure.add_axes((0.7 / width, foot / height, (width - 1.0) / width, body / height)), data)
    return file.getvalue()


def _bars(axes: Axes, data: ProjectionData) -> None:
    at, ticks = 0.0, []
    named: dict[str, tuple[Any, str]] = {}
    for size in data.sizes:
        first = at
        for bar in size.bars:
            style: Any = {"facecolor": "none", "edgecolor": _COLOURS[bar.kind], "hatch": "///", "linewidth": 1.2}
            named.setdefault(bar.kind, (axes.bar(at, bar.speedup_if_so, 0.78, **style), f"heads with {bar.kind} projections"))
            above(axes, (at, bar.speedup_if_so), 13, f"{bar.speedup_if_so:.2f}×")
            above(axes, (at, bar.speedup_if_so), 2, f"{size.tokens_per_step:.2f} ÷ {bar.overhead:.2f}", quiet=True)
            at += 0.94
        ticks.append(((first + at - 0.94) / 2, size.name))
        at += 0.6
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontweight="bold")
    axes.set_xlim(-0.75, at - 0.8)
    axes.set_ylim(0, 1.24 * max(bar.speedup_if_so for size in data.sizes for bar in size.bars))
    axes.set_ylabel("speed-up, if it were so")
    frame(axes, TITLE, list(named.values()), "left", 0.0, 1)


def _below(data: ProjectionData) -> list[str]:
    sources = dict.fromkeys(size.source for size in data.sizes)
    return [
        f"Published tokens a step ÷ measured overhead: a step of {ROWS} rows with four heads over a plain step, random weights.",
        *(f"Tokens a step: {source}." for source in sources),
        "Random weights accept nothing, so no acceptance and no speed-up was measured here.",
        *data.notes,
    ]
