"""The part that the ONNX Runtime executors share: sessions, heads, and values over host arrays."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingDependencyError, ProviderError
from . import step_io
from .executor import CacheLayout
from .packed_weights import processor
from .step_arrays import StepOutputs
from .step_plan import Wanted

CPU_PROVIDER = "CPUExecutionProvider"
_INTEGER_PRODUCT = b"MatMulIntegerToFloat"

_open_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def _let_child_end() -> None:
    """Let a forked child end although ONNX Runtime's threads exist in its parent only.

    The destructors of sessions and of the library join those threads and would wait for ever. So the child keeps its parent's
    sessions, and leaves by ``_exit`` with its own status as soon as Python has finished.
    """
    if not _open_sessions:
        return
    for session in _open_sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._sess))  # noqa: SLF001 - the object that owns the threads
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):  # glibc; it calls _exit(status, None)
        library.on_exit(library._exit, None)  # noqa: SLF001 - the name of a C function


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_child_end)


@dataclass(frozen=True, slots=True)
class OrtModel:
    """A step graph on disk and the sizes that its buffers need.

    ``packed``: its twins for several slots, by their number. ``identity``: stands for the contents of graphs and weights.
    """

    step: Path
    heads: Path
    layout: CacheLayout
    num_heads: int
    top_k: int
    hidden_size: int
    vocab_size: int
    packed: Mapping[int, Path] = field(default_factory=dict)
    identity: str = ""


class OrtBase:
    """Opens a step graph and its heads. Subclasses own the caches and run plans over them.

    ``provider``: name and options of the execution provider that must answer.
    """

    def __init__(self, model: OrtModel, ort: Any, provider: tuple[str, dict[str, str]], threads: int | None) -> None:
        self.model = model
        self.layout = model.layout
        self.engine_seconds = 0.0
        self._ort = ort
        self._provider = provider
        self._threads = threads
        self._session = self._open(model.step)
        self._heads_session: Any = None
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._run_options = ort.RunOptions()
        # ONNX Runtime asks in each run whether a graph is captured, and takes 0.1 ms to find that nothing was said.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")

    def _open(self, path: Path) -> Any:
        options = self._options(path)
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if path == self.model.heads:
            # Threads that spin while they wait for work take the time of the step's threads: a step took twice as long.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without the fallback of its Python layer, which prints and goes on with the CPU.
        graph = self._graph(path, options)
        session = self._ort.InferenceSession(graph, options, providers=[self._provider], enable_fallback=0)
        _open_sessions.add(session)
        answered = session.get_providers()
        if not answered or answered[0] != self._provider[0]:
            raise ProviderError(f"asked for {self._provider[0]}, got {answered}", hint=self._fallback_hint())
        return session

    def _options(self, path: Path) -> Any:
        """Options of the session of the graph at ``path``."""
        return session_options(self._ort, path)

    def _graph(self, path: Path, options: Any) -> str | bytes:  # noqa: ARG002 - a graph in memory must say where its data lies
        """What is opened for the file ``path``: its name, or the bytes of another graph in its place."""
        return ort_path(path)

    def _fallback_hint(self) -> str:
        """What to do when ONNX Runtime took another provider."""
        return "reinstall onnxruntime"

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads at rows chosen by the host: hidden [b, H], root int64 [b] to candidates and log_probs [b, K, k]."""
        if self._heads_session is None:
            self._heads_session = self._open(self.model.heads)
        started = time.perf_counter()
        feeds = {step_io.ROOT_HIDDEN: hidden, step_io.ROOT_TOKEN: root}
        candidates, log_probs = self._heads_session.run([step_io.CANDIDATES, step_io.LOG_PROBS], feeds)
        self.engine_seconds += time.perf_counter() - started
        return candidates, log_probs

    def _outputs(self, slots: int, logit_rows: int, wanted: Wanted) -> StepOutputs:
        model = self.model
        sizes = (model.num_heads, model.top_k, model.hidden_size, model.vocab_size)
        return StepOutputs.allocate(slots, logit_rows, *sizes, self.layout.dtype, wanted)

    def _value(self, array: np.ndarray) -> Any:
        """An OrtValue over the memory of a host array."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        if value.data_ptr() != array.ctypes.data:
            raise ProviderError("ONNX Runtime copied a buffer that must be shared", hint="use onnxruntime 1.20 or newer")
        return value


def fetched(wanted: Wanted) -> list[str]:
    """Names of the outputs that a call delivers; without heads the hidden states are among them, to tell NaN by."""
    names = [step_io.LAST_ROW, step_io.NEXT_TOKEN]
    names += [step_io.CANDIDATES, step_io.LOG_PROBS] if wanted.heads else []
    names += [step_io.LOGITS] if wanted.logits else []
    names += [step_io.HIDDEN] if wanted.hidden or not wanted.heads else []
    return names


@functools.cache
def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit integers without overflow: on x86 only if the system says so."""
    described = processor()
    return platform.machine().lower() not in ("x86_64", "amd64") or "avx512_vnni" in described or "avx_vnni" in described


def session_options(ort: Any, path: Path) -> Any:
    """Make the options that every session has, for the graph at ``path``."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not has_vnni() and path.is_file() and _INTEGER_PRODUCT in path.read_bytes():
        # They overflow there, unless ONNX Runtime is told to take kernels that take twice as long.
        # It also rewrites DequantizeLinear then, wrongly where that has zero points of a channel each.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def ort_path(path: Path) -> str:
    """Return a file's name as ONNX Runtime takes it: in UTF-8. In another locale Python holds a name's bytes in surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def import_onnxruntime(extra: str) -> Any:
    """The module onnxruntime, or an error that names the extra which brings it.

    Raises:
        MissingDependencyError: it isn't installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnxruntime isn't installed", hint=f"install it with: pip install 'medusa-deploy[{extra}]'"
        ) from error
    return onnxruntime
