"""Draws the card that every figure stands on: colours, fonts, title, legend.

It needs no display, and the same data give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, _QUIET, _CARD, _EDGE = "#1F2328", "#59636E", "#FFFFFF", "#D1D9E0"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medusa-deploy",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _EDGE,
    "xtick.color": INK,
    "ytick.color": _QUIET,
}
_FONTS = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


@contextmanager
def picture(
    width: float, height: float, kind: str, below: Sequence[str], title: str, description: str
) -> Iterator[tuple[Figure, io.BytesIO]]:
    """Open a card to add axes to, and leave the file in the buffer at the end.

    ``width`` and ``height`` are inches; ``below`` are the lines at the card's foot.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    file = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), facecolor=_CARD, edgecolor=_EDGE, linewidth=2)
        figure.text(0.2 / width, 0.15 / height, "\n".join(below), fontsize=8.5, color=_QUIET, va="bottom", linespacing=1.35)
        yield figure, file
        figure.savefig(file, format=kind, dpi=200, edgecolor=_EDGE, metadata=metadata)
    if kind == "svg":
        svg = _accessible(file.getvalue().decode(), title, description)
        file.seek(0)
        file.truncate()
        file.write(svg.encode())


def above(axes: Axes, end: tuple[float, float], points: float, text: str, *, quiet: bool = False) -> None:
    """Write ``text`` that many ``points`` above the ``end`` of a bar, in bold or (``quiet``) in grey."""
    style: Any = {"color": _QUIET, "fontsize": 9} if quiet else {"fontweight": "bold"}
    axes.annotate(text, end, (0, points), textcoords="offset points", ha="center", va="bottom", **style)


def frame(axes: Axes, title: str, entries: list[tuple[Any, str]], scale: str, start: float, rows: int) -> None:
    """Draw title and legend above the axes, from ``start`` (in widths of the axes), and hide the line of the ``scale``.

    ``rows`` is the number of rows of the figure's longest legend: with it all titles stand at one height.
    """
    axes.set_facecolor(_CARD)
    axes.annotate(
        title, (start, 1), (0, 8 + 16 * rows), "axes fraction", textcoords="offset points", fontweight="bold", fontsize=12
    )
    handles, names = zip(*entries, strict=True)
    axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(start, 1.0), ncols=3, frameon=False, fontsize=8.5,
        handlelength=1, handleheight=1, columnspacing=1.1, handletextpad=0.5, borderaxespad=0.3, borderpad=0,
    )  # fmt: skip
    axes.spines[["top", "right", scale]].set_visible(False)
    axes.tick_params(length=0)


def _accessible(svg: str, title: str, description: str) -> str:
    """Add title and description, and name fonts of which every reader has one."""
    words = f'<title id="title">{escape(title)}</title>\n <desc id="desc">{escape(description)}</desc>'
    svg = svg.replace("'DejaVu Sans'", _FONTS).replace("DejaVu Sans;", f"{_FONTS};")
    return re.sub(r"(<svg )([^>]*>)", rf'\1role="img" aria-labelledby="title desc" \2\n {_literal(words)}', svg, count=1)


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")
