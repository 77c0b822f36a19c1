"""Plain steps without heads: who runs them and at how many rows, that tokens stay, and that older engines still run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from medusa_deploy.runtime import ROOT_ONLY, Session
from medusa_deploy.runtime.errors import NumericsError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.tree import Tree
from support.fake_cuda import FakeRuntime
from support.fake_engine import add_fake_engine, load_fake
from support.fake_trt import FakeTrt

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
Load = Callable[..., Session]
ASKED: dict[str, Any] = {"token_ids": [5] * 40, "max_new_tokens": 24, "ignore_eos": True}


def older_graph(bundle: Path, folder: Path) -> Path:
    """The device graph as exports wrote it before: heads always run at the accepted row."""
    opened = open_bundle(bundle, check_hashes=False)
    graph = opened.path(opened.manifest.variants["device"])
    model = onnx.load(graph)
    [rows] = [value for value in model.graph.input if value.name == "head_rows"]
    [total] = [value for value in model.graph.output if value.name == "state_sum"]
    model.graph.input.remove(rows)
    model.graph.output.remove(total)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "head_rows"))
    onnx.save(model, folder / "step.device.onnx")
    return folder / "step.device.onnx"


def head_rows(gpu: FakeTrt) -> list[tuple[int, int]]:
    """Rows of each call since the last, and of its heads."""
    found = [(shapes["tokens"][1], shapes["head_rows"][0]) for shapes in gpu.enqueued if "head_rows" in shapes]
    gpu.enqueued.clear()
    return found


def test_only_steps_that_draft_run_the_heads(on_gpu: Load, gpu: FakeTrt, tiny_session: Session) -> None:
    plain = tiny_session.generate(speculative=False, **ASKED).token_ids
    calls = {}
    for name, options in (("plain", {"speculative": False}), ("root", {"tree": ROOT_ONLY}), ("tree", {"tree": WIDE})):
        session = on_gpu(prefix_cache=False)
        head_rows(gpu)
        assert session.generate(**options, **ASKED).token_ids == plain
        calls[name] = head_rows(gpu)
    for name in ("plain", "root"):
        assert {rows for _count, rows in calls[name]} == {0}, "neither prefill nor plain steps run heads"
    chunks = -(-len(ASKED["token_ids"]) // session.manifest.limits.prefill_chunk)
    assert [rows for _count, rows in calls["tree"][:chunks]] == [0] * (chunks - 1) + [1], "candidates behind the last chunk"
    assert {rows for count, rows in calls["tree"][chunks:] if count > 1} == {1}


def test_plain_steps_and_trees_take_turns(on_gpu: Load, tiny_session: Session) -> None:
    session = on_gpu(slots=2)
    plain = tiny_session.generate(speculative=False, **ASKED).token_ids
    for _ in range(3):
        streams = [session.stream(**options, **ASKED) for options in ({"speculative": False}, {"tree": WIDE}, {"rows": 6})]
        for stream in streams:
            assert [token for part in stream for token in part.token_ids] == plain


def test_nan_is_seen_where_no_head_runs(on_gpu: Load, gpu: FakeTrt) -> None:
    session = on_gpu()

    def spoil(found: dict[str, np.ndarray]) -> None:
        if "state_sum" in found:
            assert found["log_probs"].size == 0 and np.isfinite(found["state_sum"]).all()
            found["state_sum"] = np.full_like(found["state_sum"], np.nan)

    gpu.outputs = spoil
    with pytest.raises(NumericsError, match="NaN"):
        session.generate(speculative=False, **ASKED)


def test_an_engine_of_an_older_graph_runs_its_heads_in_every_step(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_session: Session
) -> None:
    gpu = FakeTrt(FakeRuntime())
    add_fake_engine(bundle_copy, network=older_graph(bundle_copy, tmp_path))
    session = load_fake(bundle_copy, monkeypatch, gpu)
    plain = tiny_session.generate(speculative=False, **ASKED).token_ids
    for options in ({"speculative": False}, {"tree": WIDE}, {"rows": 6}):
        assert session.generate(**options, **ASKED).token_ids == plain
    assert not head_rows(gpu)
