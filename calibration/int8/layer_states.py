"""Finds the hidden state behind every layer in a step graph, whatever the graph calls it, and computes it for a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ...runtime.backends import ort_model
from ...runtime.executors import step_io
from ...runtime.executors.one_slot import run_prompt
from ...runtime.files.bundle import Bundle
from .collect import ObservingExecutor
from .matmuls import StepGraph

# Nodes whose result is their first input in another form.
_SAME_VALUE = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
# A sum that a fused norm gives back is its fourth output.
_FUSED_SUMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def layer_outputs(nodes: Sequence[Any], layers: int) -> list[str | None]:
    """Find the tensor [B, N, H] that each layer hands on; None if the graph isn't built as expected.

    A layer adds to its input: ``y = x + f(x)``. So the residual stream is a chain of sums, one operand of which is an ancestor of
    the other. The chain is followed from the last hidden state to the embedding. A sum belongs to the last layer whose cache it
    depends on. This holds for all variants of a step: standard, fused or quantised.
    """
    stream = _Stream(nodes, layers)
    found: list[str | None] = [None] * layers
    name: str | None = stream.last_sum()
    while name is not None:
        layer = stream.layer[name]
        if layer >= 0 and found[layer] is None:  # followed backwards: the first one found is the layer's last
            found[layer] = name
        name = stream.before(name)
    return found


class _Stream:
    """Knows which node makes each tensor of a graph, and which nodes a node depends on."""

    def __init__(self, nodes: Sequence[Any], layers: int) -> None:
        self._makers: dict[str, int] = {}
        self._nodes = nodes
        self._needs: list[int] = []  # by node: a bit for every node that it depends on, itself included
        self.layer: dict[str, int] = {name: index // 2 for index, name in enumerate(step_io.past_names(layers))}
        for index, node in enumerate(nodes):
            needs = 1 << index
            for name in node.input:
                if name in self._makers:
                    needs |= self._needs[self._makers[name]]
            self._needs.append(needs)
            # A cache's size is that of all caches, and may be asked of any of them.
            layer = -1 if node.op_type == "Shape" else max((self.layer.get(name, -1) for name in node.input), default=-1)
            for name in node.output:
                self._makers[name] = index
                self.layer[name] = layer

    def last_sum(self) -> str | None:
        """Find the sum that the final norm reads."""
        if step_io.HIDDEN not in self._makers:
            return None
        needs = self._needs[self._makers[step_io.HIDDEN]]
        for index in range(len(self._nodes) - 1, -1, -1):
            if needs >> index & 1:
                for name in _sums(self._nodes[index]):
                    if self.before(name) is not None:
                        return name
        return None

    def before(self, name: str) -> str | None:
        """Find the stream before the layer, or half layer, that made the sum ``name``; None if ``name`` is no such sum."""
        index = self._makers.get(name)
        if index is None or name not in _sums(self._nodes[index]):
            return None
        first, second = (self._origin(operand) for operand in self._nodes[index].input[:2])
        for stream, branch in ((first, second), (second, first)):
            if self._reads(branch, stream):
                return stream
            inner = self.before(stream)  # attention and MLP side by side: (x + f(x)) + g(x)
            if inner is not None and self._reads(branch, inner):
                return inner
        return None

    def _reads(self, name: str, other: str) -> bool:
        """True if ``name`` depends on ``other`` and nodes make both."""
        made, reads = self._makers.get(other), self._makers.get(name)
        return made is not None and reads is not None and made != reads and bool(self._needs[reads] >> made & 1)

    def _origin(self, name: str) -> str:
        """Find the tensor of which ``name`` is another form."""
        index = self._makers.get(name)
        while index is not None and self._nodes[index].op_type in _SAME_VALUE:
            name = self._nodes[index].input[0]
            index = self._makers.get(name)
        return name


def _sums(node: Any) -> list[str]:
    if node.op_type == "Add":
        return [node.output[0]]
    return list(node.output[3:4]) if node.op_type in _FUSED_SUMS else []


class LayerStates:
    """Runs one of a bundle's step graphs and returns the states that every layer hands on."""

    def __init__(self, bundle: Bundle, variant: str, threads: int | None = None) -> None:
        """Load the variant, for one slot.

        Raises:
            MissingDependencyError: onnxruntime isn't installed.
            BundleIntegrityError: the graph can't be read.
        """
        graph = StepGraph(bundle, variant)
        self._names = layer_outputs(graph.nodes, bundle.manifest.backbone.layers)
        self._chunk = bundle.manifest.limits.prefill_chunk
        self._seen: dict[str, list[np.ndarray]] = {}
        tensors = {name: False for name in self._names if name is not None}
        self._executor = ObservingExecutor(ort_model(bundle, 1, variant), graph, tensors, self, threads)

    def take(self, values: Iterable[tuple[str, np.ndarray]], positions: np.ndarray, *, prefill: bool) -> None:
        """Keep the tensors of a call."""
        for name, value in values:
            self._seen.setdefault(name, []).append(value[0].astype(np.float32))

    def states(self, tokens: Sequence[int]) -> list[np.ndarray | None]:
        """Compute the states float32 [n, H] that each layer hands on for these tokens; None if its tensor isn't known."""
        self._seen = {}
        run_prompt(self._executor, 0, tokens, self._chunk, [0])
        return [None if name is None else np.concatenate(self._seen[name]) for name in self._names]
