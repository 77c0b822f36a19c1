"""The device graph, driven by its own outputs, decodes as the CPU's executor does under the host's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime import Session
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.executor import CacheLayout, Wanted, kept_rows
from medusa_deploy.runtime.executors.ort import OrtModel
from medusa_deploy.runtime.tree import Tree, chain
from support.tiny import HEADS, VOCAB

device_executor: Any = pytest.importorskip("medusa_deploy.export.proof.device_executor")
EVERYTHING = Wanted(heads=True, logits=True, hidden=True)
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
    """Two slots at different lengths, a third one idle; every step's inputs but the first are the step before's outputs."""
    tree, steps, margin = TREES[name], 12, HEADS
    executor = _executor(tiny_bundle, tiny_session, 3)
    rng = np.random.default_rng(3)
    prompts = {0: rng.integers(3, VOCAB, 7), 2: rng.integers(3, VOCAB, 31)}
    buffers = executor.buffers(tree.rows, EVERYTHING)
    buffers.idle(1, 0)
    fills = np.zeros((3, tree.rows), np.int64)
    emitted: dict[int, list[int]] = {}
    for slot, prompt in prompts.items():
        first = executor.prefill(slot, prompt, 0, EVERYTHING)
        emitted[slot] = [int(first.next_token[0])]
        buffers.idle(slot, len(prompt))
        fills[slot, 1:] = tree.slots[0] * first.candidates.shape[2] + tree.slots[1]
        buffers.tokens[slot] = [emitted[slot][0], *first.candidates[0][tree.slots[0], tree.slots[1]]]
        buffers.positions[slot] = len(prompt) + tree.depths
        buffers.ancestors[slot], buffers.forced[slot] = tree.ancestors, 1
    accepted = 0
    for _ in range(steps):
        executor.step(buffers, EVERYTHING, fills)
        closing = executor.closing
        for slot in prompts:
            emitted[slot] += [int(token) for token in closing[step_io.EMITTED][slot] if token >= 0]
        before, count = buffers.write_index.copy(), closing[step_io.NEXT_KEPT_COUNT]
        buffers.tokens[:], buffers.positions[:] = closing[step_io.NEXT_TOKENS], closing[step_io.NEXT_POSITIONS]
        buffers.write_index[:] = closing[step_io.NEXT_WRITE_INDEX]
        # As the host would say it: cache rows, right-aligned before the new write index.
        buffers.commit[:] = buffers.write_index[:, None] - margin + np.arange(margin)
        for slot in prompts:
            kept = closing[step_io.NEXT_KEPT][slot, : count[slot]]
            buffers.commit[slot, margin - len(kept) :] = before[slot] + kept
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
    commit = write_index - margin + np.arange(margin)
    commit[margin - len(path) :] = [before + row for row in path]
    cache = np.arange(40)
    expected = cache.copy()
    expected[write_index - margin : write_index] = cache[commit]
    kept, count = kept_rows(commit[None], np.array([write_index]), np.array([before]))
    got = cache.copy()
    got[write_index - count[0] : write_index] = cache[before + kept[0, : count[0]]]
    assert got.tolist() == expected.tolist()
    assert (kept[0, count[0] :] == 0).all()
