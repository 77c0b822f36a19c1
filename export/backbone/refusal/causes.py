"""Says in a line why a library failed, where in a model, and what transformers had reported before."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from torch import nn

_LENGTH = 300
_REPORT = re.compile(r"above report|report above")
_ROW = re.compile(r"^(\S+)\s*\|\s*(MISMATCH|CONVERSION|MISSING)\s*\|\s*(.*?)\s*$", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def first_lines(error: BaseException, most: int = 1, report: str = "") -> str:
    """Return the error's class and its first lines that say something, ``most`` of them, as one line.

    A line that ends in a colon takes the next along. A message that refers to the ``report`` above it is replaced by the
    report's rows. Where more than one line may stand, those that are left out are counted.
    """
    message = _COLOURS.sub("", str(error))
    if report and _REPORT.search(message):
        rows = [f"{name}: {kind.lower()}, {why}" for name, kind, why in _ROW.findall(report)]
        message = "\n".join(rows) or report
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if any(character.isalnum() for character in line)]
    end = min(most, len(lines))
    while 0 < end < len(lines) and lines[end - 1].endswith(":"):
        end += 1
    said = " ".join(line if len(line) <= _LENGTH else f"{line[:_LENGTH].rstrip()} …" for line in lines[:end])
    more = f" … ({len(lines) - end} more lines)" if most > 1 and end < len(lines) else ""
    return f"{type(error).__name__}: {said}{more}" if said else f"{type(error).__name__}, without a message"


class LoadReports(logging.Handler):
    """Keeps what transformers logs while it loads a model; nothing is printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Append one message."""
        self.text += _COLOURS.sub("", record.getMessage()) + "\n"


@contextlib.contextmanager
def kept_reports(reports: LoadReports) -> Iterator[None]:
    """Let transformers report to ``reports`` alone."""
    logger = logging.getLogger("transformers")
    handlers, propagated, level = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [reports], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagated
        logger.setLevel(level)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error, what caused it, what caused that …"""
    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        yield below
        below = below.__cause__ or (None if below.__suppress_context__ else below.__context__)


def deepest(error: BaseException) -> BaseException:
    """Return the error that all others followed from."""
    return list(chain(error))[-1]


def place(error: BaseException, module: nn.Module) -> str:
    """Return the innermost part of ``module`` that ran when an error was raised, such as ``model.layers.0.mlp (LlamaMLP)``.

    Returns the class of ``module`` if none of its parts was running.
    """
    import torch.fx

    names = {id(child.__dict__): name for name, child in module.named_modules() if name}  # torch.export wraps modules
    found = ""
    for each in chain(error):
        trace = each.__traceback__
        while trace is not None:
            running = trace.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module) and id(running.__dict__) in names:
                found = f"{names[id(running.__dict__)]} ({type(running).__name__})"
            node = trace.tb_frame.f_locals.get("node")  # the exporter translates one node after another
            if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
                name, kind = list(node.meta["nn_module_stack"].values())[-1]
                name = re.sub(r"\.slice\([^)]*\)", "", str(name))  # a module list's slice is no module of its own
                found = f"{name} ({str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1]})"
            trace = trace.tb_next
    return found or type(module).__name__
