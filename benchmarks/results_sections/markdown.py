"""Reads reports, and writes tables and links in Markdown."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30


def report(name: str) -> dict[str, Any]:
    """The report ``benchmarks/results/NAME.json``."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def exists(name: str) -> bool:
    """Whether there is a report ``benchmarks/results/NAME.json``."""
    return (RESULTS / f"{name}.json").is_file()


def heads_records(model: str) -> dict[str, dict[str, Any]]:
    """The records of a model's committed heads, by the names of their folders."""
    return {path.parent.name: json.loads(path.read_text("utf-8")) for path in (ROOT / "heads" / model).glob("*/config.json")}


def link(name: str, text: str = "report") -> str:
    """A link from a page in ``docs/`` to a report."""
    return f"[{text}](../benchmarks/results/{name}.json)"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A table; its first ``texts`` columns are aligned to the left, the others to the right."""
    rule = ["---" if column < texts else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def share(value: float, digits: int = 1) -> str:
    """A share as a percentage: 0.975 is ``97.5%``."""
    return f"{value * 100:.{digits}f}%"


def rate(value: float) -> str:
    """A hit rate without its leading zero: 0.465 is ``.465``."""
    return f"{value:.3f}".removeprefix("0")


def change(percent: float) -> str:
    """A relative change with its sign: 1.257 is ``+1.26 %``."""
    return signed(f"{percent:+.2f} %")


def signed(text: str) -> str:
    """A text of figures with minus signs instead of hyphens."""
    return text.replace("-", "−")


def wrapped(section: str, width: int = 118) -> str:
    """A section with its paragraphs and list items wrapped; tables and headings stay as they are."""
    return "\n\n".join(_wrapped_block(block, width) for block in section.split("\n\n"))


def _wrapped_block(block: str, width: int) -> str:
    if block.startswith(("|", "#")):
        return block
    items = re.split(r"\n(?=- )", block)
    indent = "  " if block.startswith("- ") else ""
    return "\n".join(
        textwrap.fill(" ".join(item.split()), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for item in items
    )
