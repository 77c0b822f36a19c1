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
from medusa_deploy.runtime.executors.one_slot import prefill_rows
from medusa_deploy.runtime.executors.step_plan import SlotRows, Wanted
from medusa_deploy.runtime.tree import Shape
from support.plans import prefill, verify
from support.tiny import HEADS, VOCAB

onnx: Any = pytest.importorskip("onnx")
torch: Any = pytest.importorskip("torch")
step: Any = pytest.importorskip("medusa_deploy.export.trace.step")

ROWS = 7


def random_shape(rng: np.random.Generator, rows: int) -> Shape:
    """A random tree in breadth order."""
    parents = [-1]
    while len(parents) < rows:
        parents.append(int(rng.integers(max(parents[-1], 0), len(parents))))
    return Shape.of(tuple(parents))


@pytest.mark.parametrize("seed", range(40))
def test_the_host_says_what_the_traced_graph_works_out(seed: int):
    """Random trees, whose tokens are few enough to be right now and then."""
    rng = np.random.default_rng(seed)
    visible = 32
    rows = int(rng.integers(1, ROWS + 1))
    windows = {"mask": None, "mask.2": 2, "mask.9": 9}
    cpu = CpuInputs(rows, rows, HEADS, "float32", windows)
    cpu.show(visible)
    for _ in range(4):  # over the same arrays: nothing of the step before may be left
        shape, length = random_shape(rng, rows), int(rng.integers(0, 20))
        drafted = rng.integers(0, 2, rows)
        cpu.fill(SlotRows(0, drafted, shape), length)
        assert np.array_equal(cpu.tokens[0], drafted)
        assert np.array_equal(cpu.positions[0], length + shape.depths)
        ancestors, start = torch.from_numpy(shape.ancestors[None]), torch.tensor([HEADS + length])
        positions, columns = torch.from_numpy(length + shape.depths[None]), torch.arange(visible)
        end = HEADS + length + rows
        for name, window in windows.items():
            mask = step.visibility_mask(ancestors, start, columns, HEADS, torch.float32, positions, window).numpy()
            assert np.array_equal(cpu.masks[name][..., :end], mask[..., :end]), name
        assert cpu.last_rows.tolist() == [end - 1] and cpu.visible == visible
        greedy = rng.integers(0, 2, (1, rows))
        tokens, forced = torch.from_numpy(drafted[None]), torch.ones(1, dtype=torch.int64)
        expected = step.accept(tokens, torch.from_numpy(greedy), ancestors, forced, torch.float32).numpy()
        right = drafted == np.take_along_axis(greedy, cpu.parents, 1)
        score = np.einsum("bn,bnr->br", np.where(right, 1, -1024.0), cpu.paths)
        assert np.array_equal(score.argmax(-1), expected)


def test_of_a_prompt_only_the_mask_is_worked_out():
    cpu = CpuInputs(5, 1, HEADS, "float32", {"mask": None, "mask.3": 3})
    cpu.show(24)
    cpu.fill(prefill_rows(0, np.arange(5)), 9)
    assert not cpu.paths.any() and cpu.paths.shape == (1, 5, 1)
    seen = cpu.masks["mask"][0, 0] == 0
    assert not seen[:, :HEADS].any() and seen[:, HEADS : HEADS + 9].all()
    assert np.array_equal(seen[:, HEADS + 9 : HEADS + 14], np.tri(5, dtype=bool))
    seen = cpu.masks["mask.3"][0, 0] == 0
    assert [np.flatnonzero(row).tolist() for row in seen[:, : HEADS + 14]] == [
        [HEADS + 9 + row + back for back in (-2, -1, 0)] for row in range(5)
    ]


def test_both_graphs_accept_the_same_rows(tiny_bundle: Path):
    """Drafts made of the tokens that really follow, right to a random depth."""
    executors = [load(tiny_bundle, threads=1, variant=name).executor for name in ("cpu", "standard")]
    rng = np.random.default_rng(1)
    depths = Counter[int]()
    for _ in range(12):
        prompt = rng.integers(0, VOCAB, 8)
        shape = random_shape(rng, ROWS)
        tokens = [prefill(executors[0], 0, prompt).next_token]
        after: dict[int, int] = {}  # what follows a row of right tokens
        for row, parent in enumerate(shape.parents.tolist()):
            path = [0, *shape.row_paths[row]]
            if row:
                tokens.append(after[parent] if rng.random() < 0.7 else int(rng.integers(0, VOCAB)))
            text = np.concatenate([prompt, [tokens[each] for each in path]])
            after[row] = prefill(executors[0], 0, text).next_token
        found = []
        for executor in executors:
            prefill(executor, 0, prompt)
            result = verify(executor, 0, shape, tokens, len(prompt), wanted=Wanted(heads=True))
            found.append((result.last_row, result.next_token))
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
