"""What the CPU graph takes from the host says the same as what the other graphs work out, and few operators are left of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.cpu_inputs import CpuInputs
from medusa_deploy.runtime.executors.executor import CacheLayout, StepBuffers, Wanted
from medusa_deploy.runtime.tree import Shape
from support.tiny import HEADS, VOCAB

onnx: Any = pytest.importorskip("onnx")
torch: Any = pytest.importorskip("torch")
step: Any = pytest.importorskip("medusa_deploy.export.trace.step")

SLOTS, ROWS, LAYOUT = 2, 7, CacheLayout(1, 2, 1, 64, 16, "float32")


def random_shape(rng: np.random.Generator, rows: int) -> Shape:
    """A random tree in breadth order."""
    parents = [-1]
    while len(parents) < rows:
        parents.append(int(rng.integers(max(parents[-1], 0), len(parents))))
    return Shape.of(tuple(parents))


def random_buffers(rng: np.random.Generator, rows: int) -> StepBuffers:
    """Two slots with trees of up to ``rows`` rows, whose tokens are few enough to be right now and then; one may be idle."""
    buffers = StepBuffers.allocate(SLOTS, rows, rows, HEADS, 2, 8, 16, "float32", Wanted())
    for slot in range(SLOTS):
        buffers.idle(slot, int(rng.integers(0, 20)))
        if rng.random() < 0.8:
            shape = random_shape(rng, int(rng.integers(1, rows + 1)))
            buffers.ancestors[slot, : shape.rows, : shape.rows] = shape.ancestors
            buffers.forced[slot] = 1
            buffers.tokens[slot] = rng.integers(0, 2, rows)
    return buffers


@pytest.mark.parametrize("seed", range(40))
def test_the_host_says_what_the_traced_graph_works_out(seed: int):
    rng = np.random.default_rng(seed)
    visible = 32
    cpu = CpuInputs(random_buffers(rng, ROWS), LAYOUT)
    cpu.show(visible)
    for _ in range(4):  # over the same arrays: nothing of the step before may be left
        buffers = random_buffers(rng, ROWS)
        cpu.fill(buffers)
        ancestors, start = torch.from_numpy(buffers.ancestors), torch.from_numpy(buffers.write_index)
        mask = step.visibility_mask(ancestors, start, torch.arange(visible), HEADS, torch.float32).numpy()
        for slot, end in enumerate((buffers.write_index + ROWS).tolist()):
            assert np.array_equal(cpu.mask[slot, :, :, :end], mask[slot, :, :, :end])
            assert cpu.last_rows[slot] == end - 1 and cpu.visible == visible
        greedy = rng.integers(0, 2, (SLOTS, ROWS))
        tokens, forced = torch.from_numpy(buffers.tokens), torch.from_numpy(buffers.forced)
        expected = step.accept(tokens, torch.from_numpy(greedy), ancestors, forced, torch.float32).numpy()
        right = buffers.tokens == np.take_along_axis(greedy, cpu.parents, 1)
        score = np.einsum("bn,bnr->br", np.where(right, 1, -1024.0), cpu.paths)
        assert np.array_equal(score.argmax(-1), expected)


def test_of_a_prompt_only_the_mask_is_worked_out():
    buffers = StepBuffers.allocate(1, 5, 1, HEADS, 2, 8, 16, "float32", Wanted())
    buffers.idle(0, 9)
    buffers.ancestors[0], buffers.forced[0] = np.tri(5, dtype=bool), 5
    cpu = CpuInputs(buffers, LAYOUT)
    cpu.show(24)
    cpu.fill(buffers)
    assert not cpu.paths.any() and cpu.paths.shape == (1, 5, 1)
    seen = cpu.mask[0, 0] == 0
    assert not seen[:, :HEADS].any() and seen[:, HEADS : HEADS + 9].all()
    assert np.array_equal(seen[:, HEADS + 9 : HEADS + 14], buffers.ancestors[0])


def test_both_graphs_accept_the_same_rows(tiny_bundle: Path):
    """Drafts made of the tokens that really follow, right to a random depth."""
    executors = [load(tiny_bundle, threads=1, variant=name).executor for name in ("cpu", "standard")]
    rng = np.random.default_rng(1)
    depths = Counter[int]()
    for _ in range(12):
        prompt = rng.integers(0, VOCAB, 8)
        shape = random_shape(rng, ROWS)
        tokens = [int(executors[0].prefill(0, prompt, 0, Wanted()).next_token[0])]
        after: dict[int, int] = {}  # what follows a row of right tokens
        for row, parent in enumerate(shape.parents.tolist()):
            path = [0, *shape.row_paths[row]]
            if row:
                tokens.append(after[parent] if rng.random() < 0.7 else int(rng.integers(0, VOCAB)))
            text = np.concatenate([prompt, [tokens[each] for each in path]])
            after[row] = int(executors[0].prefill(0, text, 0, Wanted()).next_token[0])
        found = []
        for executor in executors:
            executor.prefill(0, prompt, 0, Wanted())
            buffers = executor.buffers(ROWS, Wanted(heads=True))
            buffers.idle(0, len(prompt))
            buffers.tokens[0], buffers.positions[0] = tokens, len(prompt) + shape.depths
            buffers.ancestors[0], buffers.forced[0] = shape.ancestors, 1
            executor.step(buffers, Wanted(heads=True))
            found.append((int(buffers.last_row[0]), int(buffers.next_token[0])))
        assert found[0] == found[1] and found[0][1] == after[found[0][0]]
        depths[int(shape.depths[found[0][0]])] += 1
    assert len(depths) > 2, "drafts were right to several depths"


def test_few_operators_are_left_around_the_layers(tiny_bundle: Path):
    graph = onnx.load(tiny_bundle / "onnx/step.cpu.onnx", load_external_data=False).graph
    names = {value.name for value in graph.input}
    assert not names & {step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX, step_io.COLUMNS}
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"Expand", "Shape", "Cast", "Range", "Or", "Less", "ReduceMax"} & set(kinds)
    assert kinds["GatherND"] == 1 and kinds["ArgMax"] == 2 and kinds["GatherElements"] == 3
