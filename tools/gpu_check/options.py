"""Options of a run, from its command line. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .shapes import SIZES

STAGES = ("doctor", "exact", "memory", "curve", "batch", "sizes", "overhead", "breakdown", "cuda-7b")
LIMIT_SECONDS = 480
"""The longest that a stage may take, its start included."""
LIMITS = {"cuda-7b": 240}
"""Limits of stages that have their own."""
SCRATCH = ".compiled"
"""Folder below ``--out`` for what only lives while stages run."""

ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Options:
    """Options as :func:`parse` reads them. ``worker`` is the one stage that this process runs itself."""

    out: Path
    stages: tuple[str, ...]
    sizes: tuple[str, ...]
    rows: tuple[int, ...]
    device: str
    bundle: Path | None
    expected: Path | None
    limit: float
    repeats: int
    compile: bool
    strict: bool
    worker: str | None = None

    def limit_of(self, stage: str) -> float:
        """Seconds that a stage may take. Limits of its own are those of a GPU, whose time is lent."""
        return min(self.limit, LIMITS.get(stage, self.limit)) if self.device == "cuda" else self.limit

    @property
    def dtype(self) -> str:
        """Type of the torch reference: fp16 on a GPU. A CPU has no kernels for it and takes fp32."""
        return "float16" if self.device == "cuda" else "float32"


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read a command line; argparse ends the program when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m medusa_deploy.tools.gpu_check",
        description="Measure executors and a torch reference of the step on this machine's GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the only folder that is written to")
    parser.add_argument("--stages", type=_names(STAGES), default=STAGES, metavar="A,B", help=f"default: {','.join(STAGES)}")
    parser.add_argument("--sizes", type=_names(tuple(SIZES)), default=("7b", "13b"), metavar="A,B", help=f"of {','.join(SIZES)}")
    parser.add_argument("--rows", type=_rows, default=ROWS, metavar="N,N", help="sizes of a step (default: 1,2,4,8,16,32,64)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool itself")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="for the executors; without it only torch is measured")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="its tokens (default: BUNDLE/expected.json, if there)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="S", help="seconds a stage may take (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timings behind each median (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a stage isn't ok")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    values = vars(parser.parse_args(arguments))
    if values["limit"] <= 0 or values["repeats"] < 1:
        parser.error("--limit and --repeats must be positive")
    if values["limit"] > LIMIT_SECONDS:
        parser.error(f"--limit is at most {LIMIT_SECONDS}")
    return Options(**values)


def command_line(options: Options, stage: str) -> list[str]:
    """Arguments that make another process run one stage of ``options``."""
    arguments = ["--out", str(options.out), "--worker", stage, "--device", options.device]
    arguments += ["--sizes", ",".join(options.sizes), "--rows", ",".join(map(str, options.rows))]
    arguments += ["--limit", str(options.limit), "--repeats", str(options.repeats)]
    for name in ("bundle", "expected"):
        value = getattr(options, name)
        arguments += [] if value is None else [f"--{name}", str(value)]
    return arguments if options.compile else [*arguments, "--no-compile"]


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: a comma-separated choice of names, in the order of ``known``."""

    def read(text: str) -> tuple[str, ...]:
        given = [name for name in text.split(",") if name]
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; known: {', '.join(known)}")
        return tuple(name for name in known if name in given)

    return read


def _rows(text: str) -> tuple[int, ...]:
    """An argparse type: numbers of rows. 1 is always among them: all others are compared with it."""
    try:
        rows = {int(part) for part in text.split(",")} | {1}
    except ValueError:
        rows = {0}
    if min(rows) < 1 or max(rows) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 to 64")
    return tuple(sorted(rows))
