"""What the ONNX Runtime executors share: sessions, buffers, and the calls of the executor protocol."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingDependencyError, ProviderError
from . import step_io
from .executor import CacheLayout, StepBuffers, Wanted, chain_ancestors

CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class OrtModel:
    """A step graph on disk and the sizes that its buffers need."""

    step: Path
    heads: Path
    layout: CacheLayout
    num_heads: int
    top_k: int
    hidden_size: int
    vocab_size: int


class OrtBase(ABC):
    """Runs a step graph through I/O bindings, one a kind of call. Subclasses own the caches and say how things are bound.

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
        self.deepest = model.num_heads
        """Drafted tokens that a step can accept: as many rows as the next one can move into place."""
        self._bindings: dict[tuple[int, Wanted], tuple[StepBuffers, Any]] = {}
        self._run_options = ort.RunOptions()
        # ONNX Runtime asks in each run whether a graph is captured, and takes 0.1 ms to find that nothing was said.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")

    def _open(self, path: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if path == self.model.heads:
            # Threads that spin while they wait for work take the time of the step's threads: a step took twice as long.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without the fallback of its Python layer, which prints and goes on with the CPU.
        graph = self._graph(path, options)
        session = self._ort.InferenceSession(graph, options, providers=[self._provider], enable_fallback=0)
        answered = session.get_providers()
        if not answered or answered[0] != self._provider[0]:
            raise ProviderError(f"asked for {self._provider[0]}, got {answered}", hint=self._fallback_hint())
        return session

    def _graph(self, path: Path, options: Any) -> str | bytes:  # noqa: ARG002 - a graph in memory must say where its data lies
        """What is opened for the file ``path``: its name, or the bytes of another graph in its place."""
        return str(path)

    def _fallback_hint(self) -> str:
        """What to do when ONNX Runtime took another provider."""
        return "reinstall onnxruntime"

    @abstractmethod
    def _bind(self, buffers: StepBuffers, wanted: Wanted, slot: int | None) -> Any:
        """A binding of ``buffers`` and of the caches of all slots (None) or of one."""

    @abstractmethod
    def _run(self, buffers: StepBuffers, binding: Any, slot: int | None) -> None:
        """Run the step graph; the results are in ``buffers`` afterwards."""

    # -- calls -----------------------------------------------------------------------------------------------------

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        """Buffers of a step of ``rows`` rows over all slots; the same object every time."""
        key = (rows, wanted)
        if key not in self._bindings:
            buffers = self._allocate(self.layout.slots, rows, rows, wanted)
            self._bindings[key] = buffers, self._bind(buffers, wanted, None)
        return self._bindings[key][0]

    def step(self, buffers: StepBuffers, wanted: Wanted) -> None:
        """Commit, write and verify the rows of ``buffers``."""
        _, binding = self._bindings[buffers.rows, wanted]
        self._run(buffers, binding, None)

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        """Write a chunk int64 [n] at positions ``start`` … of one slot; the returned buffers are [1, …]."""
        rows = len(tokens)
        buffers = self._allocate(1, rows, 1, wanted)
        binding = self._bind(buffers, wanted, slot)
        buffers.idle(0, start)
        buffers.tokens[0] = tokens
        buffers.positions[0] = np.arange(start, start + rows)
        buffers.ancestors[0] = chain_ancestors(rows)
        buffers.forced[0] = rows
        self._run(buffers, binding, slot)
        return buffers

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads at rows chosen by the host: hidden [b, H], root int64 [b] to candidates and log_probs [b, K, k]."""
        if self._heads_session is None:
            self._heads_session = self._open(self.model.heads)
        started = time.perf_counter()
        feeds = {step_io.ROOT_HIDDEN: hidden, step_io.ROOT_TOKEN: root}
        candidates, log_probs = self._heads_session.run([step_io.CANDIDATES, step_io.LOG_PROBS], feeds)
        self.engine_seconds += time.perf_counter() - started
        return candidates, log_probs

    def _allocate(self, slots: int, rows: int, logit_rows: int, wanted: Wanted) -> StepBuffers:
        model = self.model
        return StepBuffers.allocate(
            slots, rows, logit_rows, model.num_heads, model.top_k, model.hidden_size, model.vocab_size, self.layout.dtype, wanted,
            moves=self.deepest,
        )  # fmt: skip

    def _value(self, array: np.ndarray) -> Any:
        """An OrtValue over the memory of a host array."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        if value.data_ptr() != array.ctypes.data:
            raise ProviderError("ONNX Runtime copied a buffer that must be shared", hint="use onnxruntime 1.20 or newer")
        return value

    def _small_inputs(self) -> list[str]:
        """Inputs that a step's buffers hold, as far as the graph has them."""
        names = (step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX)
        return [name for name in (*names, step_io.LOGIT_ROWS, step_io.COMMIT) if name in self._inputs]


def small_outputs(wanted: Wanted) -> list[str]:
    """Outputs that a call delivers."""
    names = [step_io.LAST_ROW, step_io.NEXT_TOKEN]
    names += [step_io.CANDIDATES, step_io.LOG_PROBS] if wanted.heads else []
    names += [step_io.LOGITS] if wanted.logits else []
    names += [step_io.HIDDEN] if wanted.hidden else []
    return names


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
