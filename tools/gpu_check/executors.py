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

    The CPU's comes first. It runs the graph that CUDA runs, too. A session has the largest of ``slots`` that the bundle allows.
    """
    if options.bundle is None:
        report.skip("executors", "no --bundle was given")
        return
    # Torch brings CUDA's libraries along: once they are loaded, ONNX Runtime and TensorRT find them.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    from ...runtime.backends import BACKENDS
    from ...runtime.files.bundle import open_bundle
    from ...runtime.session import load

    for backend in BACKENDS:
        variant = "standard" if backend == "cpu" else None
        try:
            allowed = open_bundle(options.bundle, check_hashes=False).manifest.limits.batch
            most = max(count for count in slots if count <= allowed)
            session = load(options.bundle, backend=backend, variant=variant, slots=most, prefix_cache=False)
        except Exception as error:
            report.skip(f"executor {backend}", error)
        else:
            yield backend, session
