"""Cuts a step graph into pieces: one for each layer, and one behind the last. Each runs with its own weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.errors import CalibrationError
from ...runtime.executors import step_io
from .layer_states import layer_outputs
from .matmuls import Matmul, StepGraph

_HINT = "calibrate the whole graph: --no-layer-by-layer, on a machine with memory for all weights in float32"


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of the graph with its ``matmuls``. ``layer``: its number.

    ``before``: the hidden state that it reads; None for the first, which begins with the tokens. ``after``: the hidden state that
    it hands on; None for the last, which has the final norm, vocabulary projection and heads.
    """

    layer: int
    before: str | None
    after: str | None
    matmuls: Sequence[Matmul]

    @property
    def activations(self) -> dict[str, int]:
        """Activations of its matmuls, and the number of channels of each."""
        return {matmul.activation: matmul.channels for matmul in self.matmuls}

    @property
    def outputs(self) -> list[str]:
        """Tensors that a run must return. A tensor that the piece only passes on is no output."""
        names = [*self.activations, *([] if self.after is None else [self.after])]
        return [name for name in dict.fromkeys(names) if name != self.before]


def cut_layers(graph: StepGraph, layers: int, matmuls: Sequence[Matmul]) -> list[Stage]:
    """Cut a graph into stages, in order. Every one of ``matmuls`` belongs to one of them.

    A node belongs to the stage behind the last hidden state that it depends on. Nodes that depend on none (mask, rotation,
    shapes) belong to no stage: they are little work, and every stage that needs them computes them anew.

    Raises:
        CalibrationError: the graph isn't a chain of layers, each with caches of its own.
    """
    found = layer_outputs(graph.nodes, layers)
    states = [name for name in found if name is not None]
    if len(states) < layers:
        raise CalibrationError(f"where layer {found.index(None)} ends can't be told from the graph's form", hint=_HINT)
    behind = dict(zip(states, range(1, layers + 1), strict=True))
    number_of: dict[str, int] = {}  # by tensor: the first stage that may read it
    number_of_node: dict[str, int] = {}
    for node in graph.nodes:
        number = max((number_of.get(name, 0) for name in node.input), default=0)
        number_of_node[node.name] = number
        for name in node.output:
            number_of[name] = behind.get(name, number)
    boundaries = [None, *states, None]
    stages = [
        Stage(number, boundaries[number], boundaries[number + 1], [p for p in matmuls if number_of_node[p.name] == number])
        for number in range(layers + 1)
    ]
    for stage in stages:
        _check(graph, stage, layers)
    return stages


def _check(graph: StepGraph, stage: Stage, layers: int) -> None:
    """Refuse a stage that reads another layer's cache. It may read the size of any."""
    own = {name: index // 2 for index, name in enumerate(step_io.past_names(layers))}
    for node in graph.needed_nodes(stage.outputs, () if stage.before is None else (stage.before,)):
        others = [name for name in node.input if own.get(name, stage.layer) != stage.layer and node.op_type != "Shape"]
        if others:
            raise CalibrationError(f"layer {stage.layer} depends on {others[0]}, the cache of another", hint=_HINT)
