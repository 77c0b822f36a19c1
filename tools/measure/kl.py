"""Measures how far a rewritten graph's next-token distributions are from those of the graph that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...calibration.distributions import kl_divergence, log_softmax
from ...runtime.backends import ort_model
from ...runtime.executors.ort import OrtExecutor, OrtModel
from ...runtime.session import Session
from .probe import Probe

if TYPE_CHECKING:
    import onnx_ir as ir


_SMALLEST_APART = 1024


class _InMemory(OrtExecutor):
    """Runs a graph that is nowhere on disk on the CPU. Reads tensors that lie in the bundle's files there."""

    def __init__(self, model: OrtModel, graph: ir.Model, threads: int | None) -> None:
        self._bytes, self._weights = taken_apart(graph)
        super().__init__(model, threads)

    def _graph(self, path: Path, options: Any) -> str | bytes:
        if path != self.model.step:
            return super()._graph(path, options)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        values = [self._ort.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
        options.add_external_initializers(list(self._weights), values)
        return self._bytes


def taken_apart(model: ir.Model) -> tuple[bytes, dict[str, np.ndarray]]:
    """Separate a graph from its big weights. Returns the graph's bytes and the weights by name: protobuf holds less than 2 GB."""
    import onnx_ir as ir

    graph, weights = model.clone(), dict[str, np.ndarray]()
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _SMALLEST_APART or isinstance(tensor, ir.ExternalTensor):
            continue
        weights[name] = np.ascontiguousarray(tensor.numpy())
        shape = ir.Shape(tensor.shape.numpy())
        # No file of this name is read: the session is given a value for every such weight.
        value.const_value = ir.ExternalTensor("memory", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return ir.to_proto(graph).SerializeToString(), weights


class Divergence:
    """Measures KL(reference‖other) of the distributions after every token of some answers."""

    def __init__(self, reference: Session, prompts: Sequence[list[int]], tokens: int, threads: int | None = None) -> None:
        """Answer ``prompts`` greedily, up to ``tokens`` each, and keep the distributions: 4 · V bytes for every token.

        ``reference``: a session of the bundle's CPU graph. ``threads``: threads of the engines that run graphs in memory.
        """
        self._bundle, self._threads = reference.bundle, threads
        most = min(tokens, reference.max_rows)
        answers = [(prompt, reference.generate(token_ids=prompt, max_new_tokens=most).token_ids) for prompt in prompts]
        self.texts = [(prompt, list(answer)) for prompt, answer in answers if answer]
        self._reference = list(_log_probabilities(reference, self.texts))

    @property
    def positions(self) -> int:
        """Number of distributions that are compared."""
        return sum(len(answer) for _, answer in self.texts)

    def of(self, model: ir.Model) -> tuple[float, float]:
        """Measure a graph in memory; see :meth:`of_session`."""
        executor = _InMemory(ort_model(self._bundle, 1, "cpu"), model, self._threads)
        return self.of_session(Session(self._bundle, executor, prefix_cache=False))

    def of_session(self, session: Session) -> tuple[float, float]:
        """Return the mean divergence in nats, and the share of positions where the most likely token is the same."""
        total, same = 0.0, 0
        for reference, other in zip(self._reference, _log_probabilities(session, self.texts), strict=True):
            total += float(kl_divergence(reference, other).sum())
            same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        return total / self.positions, same / self.positions


def _log_probabilities(session: Session, texts: Sequence[tuple[list[int], list[int]]]) -> Iterator[np.ndarray]:
    """Yield for each text (prompt, answer) the log-probabilities float32 [n, V] that its answer's n tokens are chosen by."""
    with Probe(session) as probe:
        for prompt, answer in texts:
            probe.restart(prompt[:-1])
            yield log_softmax(probe.chain_logits([prompt[-1], *answer[:-1]])).astype(np.float32)
