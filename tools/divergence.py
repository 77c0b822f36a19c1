"""How far the next-token distributions of a rewritten graph are from those of the graph that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.backends import ort_model
from ..runtime.bundle import Bundle
from ..runtime.executor import Wanted
from ..runtime.ort import OrtExecutor, OrtModel
from ..runtime.session import Session
from ..runtime.tree import chain
from .probe import Probe

if TYPE_CHECKING:
    import onnx_ir as ir

_LOGITS = Wanted(logits=True)


class _InMemory(OrtExecutor):
    """The CPU executor on a graph that is nowhere on disk; tensors that lie in the bundle's files are read there."""

    def __init__(self, model: OrtModel, graph: bytes, threads: int | None) -> None:
        self._bytes = graph
        super().__init__(model, threads)

    def _graph(self, path: Path, options: Any) -> str | bytes:
        if path != self.model.step:
            return super()._graph(path, options)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return self._bytes


class Divergence:
    """KL(reference ‖ other) of the distributions after every token of some answers. The reference is a bundle's CPU graph."""

    def __init__(self, bundle: Bundle, prompts: Sequence[list[int]], tokens: int, threads: int | None = None) -> None:
        """Answer ``prompts`` greedily, up to ``tokens`` each, and keep the distributions: 4 · V bytes for every token."""
        self._bundle, self._threads = bundle, threads
        session = Session(bundle, OrtExecutor(ort_model(bundle, 1, "cpu"), threads), 1)
        most = min(tokens, session.max_rows)
        answers = [(prompt, session.generate(token_ids=prompt, max_new_tokens=most).token_ids) for prompt in prompts]
        self.texts = [(prompt, list(answer)) for prompt, answer in answers if answer]
        self._reference = [_log_softmax(logits) for logits in _logits(session, self.texts)]

    @property
    def positions(self) -> int:
        """Distributions that are compared."""
        return sum(len(answer) for _, answer in self.texts)

    def of(self, model: ir.Model) -> tuple[float, float]:
        """Of a graph in memory; see :meth:`of_session`."""
        import onnx_ir as ir

        executor = _InMemory(ort_model(self._bundle, 1, "cpu"), ir.to_proto(model).SerializeToString(), self._threads)
        return self.of_session(Session(self._bundle, executor, 1))

    def of_session(self, session: Session) -> tuple[float, float]:
        """Mean divergence in nats, and the share of positions where the most likely token is the same."""
        total, same = 0.0, 0
        for reference, logits in zip(self._reference, _logits(session, self.texts), strict=True):
            other = _log_softmax(logits)
            total += float((np.exp(reference) * (reference - other)).sum())
            same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        return total / self.positions, same / self.positions


def _logits(session: Session, texts: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """For each text, prompt and answer: the logits [n, V] that its answer's n tokens are chosen by."""
    found = []
    with Probe(session) as probe:
        for prompt, answer in texts:
            probe.restart(prompt[:-1])
            rows = [prompt[-1], *answer[:-1]]
            buffers = probe.step(rows, chain(len(rows) - 1), _LOGITS)
            found.append(buffers.logits[0, : len(rows)].astype(np.float32))
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
