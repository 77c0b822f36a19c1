"""Drafting further than there are heads, where the host moves accepted rows: the text stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

pytest.importorskip("onnxruntime")

from medusa_deploy.runtime import SamplingParams, load
from medusa_deploy.runtime.executors.step_arrays import StepInputs
from medusa_deploy.runtime.session import Session
from support.tiny import HEADS, VOCAB

PROMPTS = [[int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, 5)] * 4 for seed in range(8)]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(mode="sample", temperature=0.05, seed=1)])
def test_a_step_accepts_more_tokens_than_there_are_heads(tiny_session: Session, params: SamplingParams) -> None:
    accepted = set[int]()
    for prompt in PROMPTS:
        plain = tiny_session.generate(token_ids=prompt, max_new_tokens=100, params=params, speculative=False)
        for rows in (16, None):
            found = tiny_session.generate(token_ids=prompt, max_new_tokens=100, params=params, rows=rows)
            assert found.token_ids == plain.token_ids
            accepted |= set(found.stats.accepted)
    assert max(accepted) > HEADS + 4


def test_a_graph_that_moves_rows_itself_takes_as_many_as_there_are_heads(tiny_bundle: Path) -> None:
    session = load(tiny_bundle, variant="standard", threads=1)
    for prompt in PROMPTS[:3]:
        plain = session.generate(token_ids=prompt, max_new_tokens=60, speculative=False)
        found = session.generate(token_ids=prompt, max_new_tokens=60, rows=16)
        assert found.token_ids == plain.token_ids and max(found.stats.accepted) <= HEADS


@given(st.integers(1, 6), st.integers(0, 50), st.data())
def test_rows_that_are_not_moved_stay(heads: int, length: int, data: st.DataObject) -> None:
    inputs = StepInputs.allocate(1, 4, 4, heads)
    rows = data.draw(st.lists(st.integers(0, 99), max_size=min(heads, length)))
    inputs.rest(length, tuple(rows))
    end = heads + length
    commit = inputs.commit[0].tolist()
    assert commit[heads - len(rows) :] == [heads + row for row in rows]
    assert commit[: heads - len(rows)] == list(range(end - heads, end - len(rows)))
