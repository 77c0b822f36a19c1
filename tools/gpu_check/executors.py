"""The runtime's executors, as far as they load here."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .options import Options
from .report import Report

if TYPE_CHECKING:
    from ...runtime.session import Session


def loaded_sessions(options: Options, report: Report) -> Iterator[tuple[str, Session]]:
    """(backend, session of one slot) of every backend that loads the bundle; of the others the report says why they don't.

    The CPU's comes first, over the graph that CUDA runs too.
    """
    if options.bundle is None:
        report.skip("executors", "no --bundle was given")
        return
    # Torch brings CUDA's libraries along: once they are loaded, ONNX Runtime and TensorRT find them.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    from ...runtime.backends import BACKENDS
    from ...runtime.session import load

    for backend in BACKENDS:
        try:
            session = load(options.bundle, backend=backend, variant="standard" if backend == "cpu" else None)
        except Exception as error:
            report.skip(f"executor {backend}", error)
        else:
            yield backend, session
