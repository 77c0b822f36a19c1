"""The device graph, driven by its own outputs, decodes as the CPU's executor does under the host's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime import Session
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.executor import CacheLayout
from medusa_deploy.runtime.executors.ort import OrtModel
from medusa_deploy.runtime.executors.step_arrays import StepInputs
from medusa_deploy.runtime.executors.step_plan import SlotRows, StepPlan, rows_to_move
from medusa_deploy.runtime.tree import Tree, chain
from support.plans import EVERYTHING, prefill
from support.tiny import HEADS, VOCAB

device_executor: Any = pytest.importorskip("medusa_deploy.export.proof.device_executor")
TREES = {
    "chain": chain(HEADS),
    "two branches": Tree.from_choices([(branch, *(0,) * depth) for branch in (0, 1) for depth in range(HEADS)]),
    "wide": Tree.from_choices([(rank,) for rank in range(4)] + [(1, 0), (2, 0), (2, 1)]),
}


def _executor(bundle: Path, session: Session, slots: int) -> Any:
    manifest = session.manifest
    backbone, heads = manifest.backbone, manifest.heads
    layout = CacheLayout(backbone.layers, slots, backbone.kv_heads, manifest.limits.cache_rows, backbone.head_dim, "float32")
    graph, heads_graph = bundle / "onnx/step.device.onnx", bundle / "onnx/heads.onnx"
    sizes = (heads.num_heads, heads.top_k, backbone.hidden_size, backbone.vocab_size)
    return device_executor.DeviceGraphExecutor(OrtModel(graph, heads_graph, layout, *sizes))


@pytest.mark.parametrize("name", TREES)
def test_closed_over_itself_it_emits_what_plain_decoding_emits(tiny_bundle: Path, tiny_session: Session, name: str) -> None:
    """Two slots at different lengths, a third one idle; every step's rows but the first are the step before's outputs."""
    tree, steps = TREES[name], 12
    executor = _executor(tiny_bundle, tiny_session, 3)
    rng = np.random.default_rng(3)
    prompts = {0: rng.integers(3, VOCAB, 7), 2: rng.integers(3, VOCAB, 31)}
    fills = np.zeros((3, tree.rows), np.int64)
    tokens, lengths = np.zeros((3, tree.rows), np.int64), [0, 0, 0]
    moves: list[tuple[int, ...]] = [(), (), ()]
    emitted: dict[int, list[int]] = {}
    for slot, prompt in prompts.items():
        first = prefill(executor, slot, prompt, wanted=EVERYTHING)
        assert first.candidates is not None
        emitted[slot], lengths[slot] = [first.next_token], len(prompt)
        fills[slot, 1:] = tree.slots[0] * first.candidates.shape[1] + tree.slots[1]
        tokens[slot] = [first.next_token, *first.candidates[tree.slots[0], tree.slots[1]]]
    accepted = 0
    for _ in range(steps):
        active = tuple([SlotRows(slot, tokens[slot], tree, wanted=EVERYTHING) for slot in prompts])
        executor.run(StepPlan(active, tuple(lengths), tuple(moves)), fills)
        closing = executor.closing
        tokens = closing[step_io.NEXT_TOKENS]
        for slot in prompts:
            emitted[slot] += [int(token) for token in closing[step_io.EMITTED][slot] if token >= 0]
            kept = closing[step_io.NEXT_KEPT][slot, : closing[step_io.NEXT_KEPT_COUNT][slot]].tolist()
            moves[slot] = rows_to_move(lengths[slot], tuple(kept))
            lengths[slot] = int(closing[step_io.NEXT_WRITE_INDEX][slot]) - HEADS
            assert closing[step_io.NEXT_POSITIONS][slot].tolist() == (lengths[slot] + tree.depths).tolist()
            accepted += len(kept)
    assert accepted > 0, "the tree accepted nothing: the test proves nothing"
    for slot, prompt in prompts.items():
        plain = tiny_session.generate(
            token_ids=prompt.tolist(), speculative=False, max_new_tokens=len(emitted[slot]), ignore_eos=True
        )
        assert emitted[slot] == plain.token_ids
    assert not closing[step_io.NEXT_KEPT_COUNT][1] and (closing[step_io.EMITTED][1] == -1).all(), "the idle slot stands still"


@given(data=st.data(), margin=st.integers(1, 5))
def test_kept_rows_put_the_same_rows_in_the_same_places_as_a_commit(data: st.DataObject, margin: int) -> None:
    """A cache whose rows hold their own numbers, committed both ways."""
    length = data.draw(st.integers(0, 9))
    path = sorted(data.draw(st.sets(st.integers(1, 9), max_size=margin)))
    before = margin + length
    write_index = before + 1 + len(path)
    moves = rows_to_move(length, tuple(path))
    inputs = StepInputs.allocate(1, 1, 1, margin)
    inputs.rest(length + 1 + len(path), moves)
    assert inputs.write_index.tolist() == [write_index]
    cache = np.arange(40)
    expected = cache.copy()
    expected[write_index - margin : write_index] = cache[inputs.commit[0]]
    kept, count = device_executor.kept_rows([moves], np.array([length]), margin)
    got = cache.copy()
    got[write_index - count[0] : write_index] = cache[before + kept[0, : count[0]]]
    assert got.tolist() == expected.tolist()
    assert (kept[0, count[0] :] == 0).all()
    assert got[write_index - len(path) : write_index].tolist() == [before + row for row in path]
