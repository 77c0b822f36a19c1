"""Loads the runtime's executors, as far as this machine has what they need."""

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
    """Yield (backend, session of one slot) for every backend that loads the bundle. The report says why the others don't.

    The CPU's comes first. It runs the graph that CUDA runs, too.
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
            session = load(options.bundle, backend=backend, variant="standard" if backend == "cpu" else None, prefix_cache=False)
        except Exception as error:
            report.skip(f"executor {backend}", error)
        else:
            yield backend, session
