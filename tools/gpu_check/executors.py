"""Loads the runtime's executors, as far as this machine has what they need."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .options import Options
from .report import Report

if TYPE_CHECKING:
    from ...runtime.session import Session


def loaded_sessions(options: Options, report: Report, slots: Sequence[int] = (1,)) -> Iterator[tuple[str, Session]]:
    """Yield (backend, session) for every backend that loads the bundle. The report says why the others don't.

    The CPU's comes first. It runs the graph that CUDA runs, too. A session has as many of ``slots`` as the backend allows: the
    largest number is tried first.
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
        variant = "standard" if backend == "cpu" else None
        for count in sorted(slots, reverse=True):
            try:
                session = load(options.bundle, backend=backend, variant=variant, slots=count, prefix_cache=False)
            except Exception as error:
                if count == min(slots):
                    report.skip(f"executor {backend}", error)
            else:
                yield backend, session
                break
