"""Names what failed when a library raises while a backbone is traced, converted or checked."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from ...runtime.errors import DeployError, TraceError
from ..backbone.record import Backbone
from ..backbone.refusal.causes import chain, deepest, first_lines, place

P = ParamSpec("P")
T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


def named_failures(doing: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function raise TraceError for whatever a library raises in it; one of its arguments is the backbone.

    ``doing``: what it does to the backbone, such as "traced". An error that a user can fix passes, also from inside of a
    library's own error. So do full disks and memories.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def named(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except (DeployError, OSError, MemoryError):
                raise
            except Exception as error:  # libraries raise whatever they raise
                fixable = next((each for each in chain(error) if isinstance(each, DeployError)), None)
                if fixable is not None:
                    raise fixable from error
                backbone = next(each for each in (*args, *kwargs.values()) if isinstance(each, Backbone))
                raise _named(error, backbone, doing) from error

        return named

    return decorate


def _named(error: Exception, backbone: Backbone, doing: str) -> TraceError:
    module = backbone.module
    where, cause = place(error, module), first_lines(deepest(error))
    summary = f"{module.config.model_type} ({type(module).__name__}) can't be {doing}: {where} raises {cause}"
    log = _write_log(error, f"{summary}\n\n{module.config}")
    return TraceError(summary, hint=f"choose another backbone, or report it with the full log: {log}")


def _write_log(error: BaseException, summary: str) -> Path:
    """Write the summary, the versions and the traceback into a new file of the system's folder for temporary files."""
    versions = "\n".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    handle, name = tempfile.mkstemp(prefix="medusa-deploy-export-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{summary}\n\n{versions}\n\n{''.join(traceback.format_exception(error))}")
    return Path(name)
