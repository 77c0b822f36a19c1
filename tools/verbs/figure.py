"""``medusa-deploy figure``: reports of bench as one picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..figure.data import FigureData
    from ..figure.projection import ProjectionData

HELP = "draw reports of bench: tokens/s with speed-ups, and where a step's time goes"
KINDS = (".svg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument

    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="reports that bench --json wrote; or, with --projection, gpu_check.json",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture: .svg or .png")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="FILE=NAME",
        help="a report's model (default: the label in it, or the file's name)",
    )
    parser.add_argument(
        "--stage", action="append", default=[], metavar="FILE=1|2", help="whether a report's heads are Medusa-1 or Medusa-2"
    )
    parser.add_argument(
        "--projection",
        action="store_true",
        help="RESULTS are files of gpu_check: measured overhead at the published acceptance, as a figure of its own",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Draw the figure and print it in words."""
    from dataclasses import asdict

    from ...runtime.errors import UsageError
    from ..console import emit
    from ..figure.draw import describe
    from ..figure.projection import describe_projection

    labels = _pairs("--label", args.label)
    if args.projection:
        if args.stage:
            raise UsageError("a projection has no stage", hint="leave --stage out: the acceptance's source says which")
        projected = draw_projected(args.results, args.output, labels=labels, force=args.force)
        report = {"output": args.output, "measured": False, **asdict(projected)}
        emit(f"{describe_projection(projected)}\n\n{args.output}", report, args.json)
        return 0
    stages = {path: int(text) if text in ("1", "2") else 0 for path, text in _pairs("--stage", args.stage).items()}
    data = draw_figure(args.results, args.output, labels=labels, stages=stages, force=args.force)
    emit(f"{describe(data)}\n\n{args.output}", {"output": args.output, **asdict(data)}, args.json)
    return 0


def draw_figure(
    results: Sequence[Path],
    output: Path | str,
    *,
    labels: Mapping[Path, str] | None = None,
    stages: Mapping[Path, int] | None = None,
    force: bool = False,
) -> FigureData:
    """Draw the reports into ``output``, which is written whole or not at all. Returns the figure's data.

    Several models are drawn as a figure of model sizes, in the order of their first reports.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
        MissingDependencyError: matplotlib isn't installed.
        OutputError: the file system refused.
        UsageError: a suffix other than .svg and .png, a report that can't be read or drawn.
    """
    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import write_whole
    from ..extras import require
    from ..figure.data import figure_data
    from ..figure.draw import draw
    from ..figure.sizes import draw_sizes

    output, kind = _checked(output, force=force)
    stages = stages or {}
    for path, stage in stages.items():
        if stage not in (1, 2):
            raise UsageError(f"the stage of {path} is neither 1 nor 2", hint="--stage FILE=1 or --stage FILE=2")
    data = figure_data(_reports(results, "give reports that medusa-deploy bench --json wrote"), labels, stages)
    require("figure")
    several = len({group.model for group in data.groups}) > 1
    write_whole(output, draw_sizes(data, kind) if several else draw(data, kind))
    return data


def draw_projected(
    results: Sequence[Path], output: Path | str, *, labels: Mapping[Path, str] | None = None, force: bool = False
) -> ProjectionData:
    """Draw the projections in reports of ``gpu_check``, at a published acceptance; else as :func:`draw_figure`.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
        MissingDependencyError: matplotlib isn't installed.
        OutputError: the file system refused.
        UsageError: a suffix other than .svg and .png; a report of ``bench``, which is measured, or one without a projection.
    """
    from ...runtime.files.bundle import write_whole
    from ..extras import require
    from ..figure.projection import HINT, draw_projection, projection_data

    output, kind = _checked(output, force=force)
    data = projection_data(_reports(results, HINT), labels)
    require("figure")
    write_whole(output, draw_projection(data, kind))
    return data


def _checked(output: Path | str, *, force: bool) -> tuple[Path, str]:
    """Check that the file may be written. Returns its path, and ``svg`` or ``png``."""
    from ...runtime.arguments import flag, path
    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import refuse_existing

    output = path("output", output)
    kind = output.suffix.lower()
    if kind not in KINDS:
        raise UsageError(f"{output}: can't draw {kind or 'a file without a suffix'}", hint=f"name it {' or '.join(KINDS)}")
    refuse_existing(output, force=flag("force", force))
    return output, kind[1:]


def _reports(results: Sequence[Path], hint: str) -> dict[Path, Any]:
    from ...runtime.errors import UsageError
    from ...runtime.files.json_file import read_json_file
    from ..figure.reports import MAX_REPORT_BYTES

    return {path: read_json_file(path, limit=MAX_REPORT_BYTES, error=UsageError, hint=hint) for path in results}


def _pairs(option: str, texts: Sequence[str]) -> dict[Path, str]:
    from ...runtime.errors import UsageError

    pairs = {}
    for text in texts:
        path, _, value = text.rpartition("=")
        if not path or not value:
            raise UsageError(f"{option} {text} is not FILE=VALUE", hint=f"for instance {option} results.json=…")
        pairs[Path(path)] = value
    return pairs
