"""Buffers of a step, and where its rows lie in the caches."""

from __future__ import annotations

import dataclasses

from hypothesis import given, strategies as st

from medusa_deploy.runtime import SamplingParams, Session
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.executor import StepBuffers, Wanted, chain_ancestors, visible_rows
from medusa_deploy.runtime.executors.ort import OrtExecutor

_sizes = st.tuples(st.integers(1, 500), st.integers(1, 8), st.integers(1, 64))  # capacity, heads, most rows of a step
EVERYTHING = Wanted(heads=True, logits=True, hidden=True)


def _buffers(slots: int = 2, rows: int = 3, logit_rows: int = 3, heads: int = 4, wanted: Wanted = EVERYTHING) -> StepBuffers:
    return StepBuffers.allocate(slots, rows, logit_rows, heads, 5, 6, 7, "float16", wanted)


@given(_sizes)
def test_caches_hold_the_margin_the_capacity_and_the_longest_scatter_of_the_widest_step(sizes: tuple[int, int, int]) -> None:
    capacity, heads, max_rows = sizes
    rows = step_io.cache_rows(capacity, heads, max_rows)
    assert rows % step_io.CACHE_ALIGNMENT == 0
    assert 0 <= rows - (heads + capacity + max_rows + heads) < step_io.CACHE_ALIGNMENT


def test_cache_names_pair_up() -> None:
    assert step_io.past_names(2) == ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert step_io.present_names(2) == [name.replace("past", "present") for name in step_io.past_names(2)]


def test_shapes_are_those_of_the_table() -> None:
    buffers = _buffers(slots=2, rows=3, logit_rows=1, heads=4)
    assert {field.name: getattr(buffers, field.name).shape for field in dataclasses.fields(buffers)} == {
        "tokens": (2, 3),
        "positions": (2, 3),
        "ancestors": (2, 3, 3),
        "forced": (2,),
        "write_index": (2,),
        "logit_rows": (2, 1),
        "commit": (2, 4),
        "draft_slots": (2, 3),
        "last_row": (2,),
        "next_token": (2,),
        "candidates": (2, 4, 5),
        "log_probs": (2, 4, 5),
        "logits": (2, 1, 7),
        "hidden": (2, 1, 6),
    }
    assert buffers.logit_rows.tolist() == [[2], [2]], "in prefill the last row's logits are computed"
    assert _buffers(rows=3, logit_rows=3).logit_rows.tolist() == [[0, 1, 2]] * 2
    types = [array.dtype.name for array in (buffers.logits, buffers.hidden, buffers.log_probs)]
    assert types == ["float16", "float16", "float32"]


def test_outputs_that_are_not_wanted_take_no_memory() -> None:
    buffers = _buffers(wanted=Wanted())
    assert (buffers.logits.nbytes, buffers.hidden.nbytes) == (0, 0)


@given(_sizes, st.data())
def test_an_idle_slot_does_nothing_within_its_cache(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    capacity, heads, max_rows = sizes
    length, rows = data.draw(st.integers(0, capacity)), data.draw(st.integers(1, max_rows))
    buffers = _buffers(rows=rows, logit_rows=rows, heads=heads)
    for field in dataclasses.fields(buffers):
        getattr(buffers, field.name)[:] = 1
    buffers.idle(1, length)
    assert not buffers.ancestors[1].any() and buffers.forced[1] == 0
    first, end = buffers.write_index[1] - heads, buffers.write_index[1] + rows
    assert first >= 0 and end <= step_io.cache_rows(capacity, heads, max_rows)
    assert buffers.write_index[1] == heads + length, "no committed row is written over"
    assert buffers.commit[1].tolist() == list(range(first, first + heads)), "every committed row stays where it is"
    for field in dataclasses.fields(buffers):
        assert (getattr(buffers, field.name)[0] == 1).all(), f"{field.name} of another slot has changed"


@given(st.lists(st.integers(0, 900), min_size=1, max_size=4), st.integers(1, 64))
def test_the_visible_rows_cover_every_slot_and_change_seldom(starts: list[int], rows: int) -> None:
    buffers = _buffers(slots=len(starts), rows=rows, logit_rows=rows)
    buffers.write_index[:] = starts
    cache_rows = 1000
    visible = visible_rows(buffers, cache_rows)
    assert max(starts) + rows <= visible <= cache_rows
    assert visible % 64 == 0 or visible == cache_rows
    assert visible - (max(starts) + rows) < 64


def test_a_chain_sees_what_came_before() -> None:
    T, F = True, False
    assert chain_ancestors(3).tolist() == [[T, F, F], [T, T, F], [T, T, T]]


def test_the_threads_of_the_heads_do_not_spin_beside_those_of_the_step(tiny_session: Session) -> None:
    """Sampling runs the heads as a session of their own; its threads, waiting busily, doubled the time of each step."""
    tiny_session.generate(token_ids=[5, 6, 7], max_new_tokens=8, params=SamplingParams(mode="sample", seed=1))
    executor = tiny_session.executor
    assert isinstance(executor, OrtExecutor) and executor._heads_session is not None
    options = executor._heads_session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
