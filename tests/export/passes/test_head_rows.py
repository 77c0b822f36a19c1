"""The device graph's heads run at one row or at none: what they guess, and what the other outputs are without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime.executors import step_io
from support.graphs import opened
from support.tiny import HEADS, HIDDEN, VOCAB, random_heads

torch: Any = pytest.importorskip("torch")
ir: Any = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
backbone: Any = pytest.importorskip("medusa_deploy.export.backbone.backbone")
heads: Any = pytest.importorskip("medusa_deploy.export.heads.module")
trace: Any = pytest.importorskip("medusa_deploy.export.trace.trace")
lower: Any = pytest.importorskip("medusa_deploy.export.passes.lower")

TOP, ROWS, CAPACITY = 4, 80, 64


def feeds(tokens: np.ndarray, shape: Any, head_rows: int) -> dict[str, np.ndarray]:
    """A plain step of each slot, after nothing."""
    slots = len(tokens)
    one = np.ones(slots, np.int64)
    found = {
        step_io.TOKENS: tokens[:, None], step_io.POSITIONS: np.zeros((slots, 1), np.int64),
        step_io.ANCESTORS: np.ones((slots, 1, 1), bool), step_io.FORCED: one, step_io.WRITE_INDEX: one * HEADS,
        step_io.COLUMNS: np.arange(64), step_io.LOGIT_ROWS: np.zeros((slots, 1), np.int64),
        step_io.KEPT: np.zeros((slots, HEADS), np.int64), step_io.KEPT_COUNT: np.zeros(slots, np.int64),
        step_io.DRAFT_SLOTS: np.zeros((slots, 1), np.int64), step_io.HEAD_ROWS: np.zeros(head_rows, np.int64),
    }  # fmt: skip
    for names, length in ((step_io.past_names, ROWS), (step_io.carried_names, 1)):
        found |= {name: np.zeros((slots, shape.kv_heads, length, shape.head_dim), np.float32) for name in names(shape.layers)}
    return found


@pytest.mark.parametrize(
    ("kind", "layers", "projection"),
    [
        ("grounded", 1, "pruned"),
        *(
            pytest.param(*form, marks=pytest.mark.slow)
            for form in (("medusa", 1, "shared"), ("medusa", 1, "own"), ("grounded", 2, "own"))
        ),
    ],
)
def test_heads_of_every_form_run_at_one_row_or_at_none(tiny_model: Path, kind: str, layers: int, projection: str) -> None:
    loaded = backbone.load_backbone(tiny_model, "fp32", CAPACITY)
    stack = heads.HeadStack(random_heads(kind, layers, projection), loaded.module.get_output_embeddings(), TOP, torch.float32)
    step, alone = trace.trace_step(loaded, stack, ROWS, CAPACITY), trace.trace_heads(loaded, stack)
    lower.lower_device(step)
    engine, head_session = opened(step), opened(alone)
    names = [value.name for value in engine.get_outputs()]
    shapes = {value.name: value.shape for value in engine.get_outputs()}
    assert isinstance(shapes["candidates"][1], str) and shapes["candidates"][2] == TOP, "the number of rows is free"
    tokens = np.array([3, VOCAB - 1, 7])
    with_heads, without = (dict(zip(names, engine.run(None, feeds(tokens, loaded.shape, rows)), strict=True)) for rows in (1, 0))
    given = {"hidden": with_heads["hidden"][:, 0], "root": with_heads["next_token"]}
    expected = head_session.run(
        ["candidates", "log_probs"], {value.name: given[value.name] for value in head_session.get_inputs()}
    )
    np.testing.assert_array_equal(with_heads["candidates"], expected[0])
    np.testing.assert_allclose(with_heads["log_probs"], expected[1], atol=1e-5)
    assert without["candidates"].shape == without["log_probs"].shape == (3, 0, TOP)
    np.testing.assert_allclose(without["state_sum"], with_heads["hidden"].reshape(3, HIDDEN).sum(1), rtol=1e-3, atol=1e-3)
    for name in set(names) - {"candidates", "log_probs"}:
        np.testing.assert_array_equal(without[name], with_heads[name], err_msg=name)
