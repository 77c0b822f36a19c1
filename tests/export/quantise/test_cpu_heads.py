"""Heads in 8 bits guess what they guessed before, in every layout of heads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime.errors import QuantisationError
from support.graphs import opened
from support.tiny import HEADS, HIDDEN, VOCAB, random_heads

torch: Any = pytest.importorskip("torch")
ir: Any = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
backbone: Any = pytest.importorskip("medusa_deploy.export.backbone.backbone")
cpu_heads: Any = pytest.importorskip("medusa_deploy.export.quantise.cpu_heads")
heads: Any = pytest.importorskip("medusa_deploy.export.heads.module")
quantise_cpu: Any = pytest.importorskip("medusa_deploy.export.quantise.cpu")
trace: Any = pytest.importorskip("medusa_deploy.export.trace.trace")
read_graph: Any = pytest.importorskip("medusa_deploy.export.weights").read_graph

TOP = 4


@pytest.fixture(scope="module")
def tiny_backbone(tiny_model: Path) -> Any:
    return backbone.load_backbone(tiny_model, "fp32", 64)


def run(model: Any, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(opened(model).run(["candidates", "log_probs"], {"hidden": hidden, "root": root}))


@pytest.mark.parametrize(
    ("kind", "layers", "projection", "few", "exact"),
    [
        ("grounded", 1, "pruned", 2, 0),  # all blocks as one, and the projection
        ("medusa", 1, "shared", 1, 1),  # the backbone's own projection stays
        ("medusa", 1, "own", 2 * HEADS, 0),  # each block has a projection of its own
        ("medusa", 2, "pruned", 2 * HEADS + 1, 0),  # second layers read different things
    ],
)
def test_heads_in_8_bits_guess_the_same(
    tiny_backbone: Any, kind: str, layers: int, projection: str, few: int, exact: int
) -> None:
    stack = heads.HeadStack(
        random_heads(kind, layers, projection), tiny_backbone.module.get_output_embeddings(), TOP, torch.float32
    )
    model = trace.trace_heads(tiny_backbone, stack)
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(16, HIDDEN)).astype(np.float32), rng.integers(0, VOCAB, 16)
    before = run(model, *inputs)
    cpu_heads.narrow_heads(model, shared=projection == "shared")
    operators = Counter(node.op_type for node in model.graph)
    assert (operators["MatMulNBits"], operators["MatMul"]) == (few, exact)
    written = [value.const_value for node in model.graph if node.op_type == "MatMulNBits" for value in node.inputs[1:]]
    assert sum(tensor.nbytes for tensor in written) == cpu_heads.narrow_size(stack.config), "what a dry run counts"
    after = run(model, *inputs)
    assert (before[0][..., 0] == after[0][..., 0]).mean() > 0.9
    error = np.abs(before[1] - after[1]).max()
    assert 0 < error < 0.2, "log-probabilities are rounded, not others"


def test_a_step_graph_has_them_and_quantising_it_leaves_them(tiny_bundle: Path) -> None:
    model = read_graph(tiny_bundle / "onnx/step.cpu.onnx")
    [choice] = [node for node in model.graph if node.op_type == "If"]
    branch = choice.attributes["then_branch"].as_graph()
    made = [str(node.name) for node in branch if node.op_type == "MatMulNBits"]
    assert len(made) == 1 and "Concat" not in {node.op_type for node in branch}
    quantise_cpu.quantise_cpu(model, quantise_cpu.CpuPrecision())
    assert set(made) < {str(node.name) for node in branch if node.op_type == "MatMulNBits"}, "and the shared projection"
    with pytest.raises(QuantisationError, match="have 8 bits already"):
        quantise_cpu.quantise_cpu(read_graph(tiny_bundle / "onnx/step.cpu.onnx"), quantise_cpu.CpuPrecision(heads=4))
