"""Arrays of a step, where its rows lie in the caches, and what executors keep between steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Session, chain
from medusa_deploy.runtime.backends import ort_model
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.one_slot import prefill_rows
from medusa_deploy.runtime.executors.ort import OrtExecutor
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor
from medusa_deploy.runtime.executors.step_arrays import StepInputs, StepOutputs, visible_rows
from medusa_deploy.runtime.executors.step_plan import NO_OUTPUTS, SlotResult, SlotRows, StepPlan, Wanted, rows_to_move
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.tree import Shape
from support.plans import EVERYTHING, plain_plan, prefill, run, verify
from support.tiny import HEADS, VOCAB
from support.trees import random_tree

_sizes = st.tuples(st.integers(1, 500), st.integers(1, 8), st.integers(1, 64))  # capacity, heads, most rows of a step


def _outputs(wanted: Wanted, slots: int = 2, logit_rows: int = 3) -> StepOutputs:
    return StepOutputs.allocate(slots, logit_rows, 4, 5, 6, 7, "float16", wanted)


# -- the caches ----------------------------------------------------------------------------------------------------


@given(_sizes)
def test_caches_hold_the_margin_the_capacity_and_the_longest_scatter_of_the_widest_step(sizes: tuple[int, int, int]) -> None:
    capacity, heads, max_rows = sizes
    rows = step_io.cache_rows(capacity, heads, max_rows)
    assert rows % step_io.CACHE_ALIGNMENT == 0
    assert 0 <= rows - (heads + capacity + max_rows + heads) < step_io.CACHE_ALIGNMENT


def test_cache_names_pair_up() -> None:
    assert step_io.past_names(2) == ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert step_io.present_names(2) == [name.replace("past", "present") for name in step_io.past_names(2)]


@given(st.lists(st.integers(0, 900), min_size=1, max_size=4), st.integers(1, 64))
def test_the_visible_rows_cover_every_slot_and_change_seldom(starts: list[int], rows: int) -> None:
    cache_rows = 1000
    visible = visible_rows(max(starts) + rows, cache_rows)
    assert max(starts) + rows <= visible <= cache_rows
    assert visible % 64 == 0 or visible == cache_rows
    assert visible - (max(starts) + rows) < 64


# -- the arrays ----------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_table() -> None:
    inputs, outputs = StepInputs.allocate(2, 3, 1, 4), _outputs(EVERYTHING, logit_rows=1)
    arrays = {name: value for each in (inputs, outputs) for name, value in _arrays(each).items()}
    assert {name: array.shape for name, array in arrays.items()} == {
        "tokens": (2, 3),
        "positions": (2, 3),
        "ancestors": (2, 3, 3),
        "forced": (2,),
        "write_index": (2,),
        "logit_rows": (2, 1),
        "commit": (2, 4),
        "last_row": (2,),
        "next_token": (2,),
        "candidates": (2, 4, 5),
        "log_probs": (2, 4, 5),
        "logits": (2, 1, 7),
        "hidden": (2, 1, 6),
    }
    assert inputs.logit_rows.tolist() == [[2], [2]], "in prefill the last row's logits are computed"
    assert StepInputs.allocate(2, 3, 3, 4).logit_rows.tolist() == [[0, 1, 2]] * 2
    types = [array.dtype.name for array in (outputs.logits, outputs.hidden, outputs.log_probs)]
    assert types == ["float16", "float16", "float32"]


def _arrays(of: Any) -> dict[str, np.ndarray]:
    values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def test_outputs_that_are_not_wanted_take_no_memory() -> None:
    outputs = _outputs(Wanted(heads=True))
    assert (outputs.logits.nbytes, outputs.hidden.nbytes) == (0, 0)
    assert _outputs(NO_OUTPUTS).logits.nbytes == 0
    assert _outputs(NO_OUTPUTS).hidden.shape == (2, 3, 6), "NaN is told by them"


@given(_sizes, st.data())
def test_a_resting_slot_does_nothing_within_its_cache(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    capacity, heads, max_rows = sizes
    length, rows = data.draw(st.integers(0, capacity)), data.draw(st.integers(1, max_rows))
    inputs = StepInputs.allocate(2, rows, rows, heads)
    for array in _arrays(inputs).values():
        array[:] = 1
    inputs.rest(length, index=1)
    assert not inputs.ancestors[1].any() and inputs.forced[1] == 0
    first, end = inputs.write_index[1] - heads, inputs.write_index[1] + rows
    assert first >= 0 and end <= step_io.cache_rows(capacity, heads, max_rows)
    assert inputs.write_index[1] == heads + length, "no committed row is written over"
    assert inputs.commit[1].tolist() == list(range(first, first + heads)), "every committed row stays where it is"
    for name, array in _arrays(inputs).items():
        assert (array[0] == 1).all(), f"{name} of another slot has changed"


@given(_sizes, st.integers(0, 1 << 16), st.data())
def test_rows_are_encoded_over_whatever_was_there(sizes: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    capacity, heads, _ = sizes
    rng = np.random.default_rng(seed)
    tree, length = random_tree(rng, depth=heads), data.draw(st.integers(0, capacity))
    padded, tokens = tree.rows + data.draw(st.integers(0, 3)), rng.integers(0, 99, tree.rows)
    inputs = StepInputs.allocate(2, padded, padded, heads)
    for array in _arrays(inputs).values():
        array[:] = 1
    inputs.fill(SlotRows(7, tokens, tree), length, (), 1)
    count = tree.rows
    assert inputs.tokens[1].tolist() == [*tokens.tolist(), *[0] * (padded - count)]
    assert inputs.positions[1, :count].tolist() == (length + tree.depths).tolist()
    assert np.array_equal(inputs.ancestors[1, :count, :count], tree.ancestors)
    assert inputs.ancestors[1].sum() == tree.ancestors.sum(), "a row that isn't its own ancestor is padding"
    assert (inputs.forced[1], inputs.write_index[1]) == (1, heads + length)
    for name, array in _arrays(inputs).items():
        assert (array[0] == 1).all(), f"{name} of another slot has changed"


def test_a_chain_sees_what_came_before() -> None:
    T, F = True, False
    assert Shape.chain(3).ancestors.tolist() == [[T, F, F], [T, T, F], [T, T, T]]
    assert Shape.chain(3) is Shape.chain(3)


# -- accepted rows -------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.data())
def test_rows_to_move_are_those_from_the_first_one_out_of_place(length: int, data: st.DataObject) -> None:
    """Rows that hold their own numbers, and the accepted ones moved as a plan says."""
    path = tuple(sorted(data.draw(st.sets(st.integers(1, 12), max_size=6))))
    moves = rows_to_move(length, path)
    end = length + 1 + len(path)
    rows = list(range(80))
    rows[end - len(moves) : end] = [rows[row] for row in moves]
    assert rows[:end] == [*range(length + 1), *(length + row for row in path)]
    assert not moves or moves[0] != end - len(moves), "what is in place isn't moved"


@pytest.fixture(scope="module")
def executors(tiny_bundle: Path) -> dict[str, OrtExecutor | OrtDeviceExecutor]:
    """Three slots each: the two graphs of the CPU's executor, and the GPU's over host memory."""
    bundle = open_bundle(tiny_bundle)
    return {
        "cpu": OrtExecutor(ort_model(bundle, 3, "cpu"), threads=1),
        "standard": OrtExecutor(ort_model(bundle, 3, "standard"), threads=1),
        "device": OrtDeviceExecutor(ort_model(bundle, 3, "standard"), "cpu", threads=1),
    }


NAMES = ("cpu", "standard", "device")


def caches_of(executor: OrtExecutor | OrtDeviceExecutor) -> np.ndarray:
    """A copy [2·layers, slots, H_kv, S, D_h]."""
    if isinstance(executor, OrtExecutor):
        return executor.caches.copy()
    return np.stack([cache.numpy() for cache in executor.caches])


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_resting_slots_are_moved_and_no_others(executors: Any, name: str) -> None:
    executor, rng = executors[name], np.random.default_rng(0)
    lengths = [20, 9, 30]
    for slot, length in enumerate(lengths):
        prefill(executor, slot, rng.integers(0, VOCAB, length))
        # Rows that a step has written behind them.
        verify(executor, slot, chain(HEADS), rng.integers(0, VOCAB, HEADS + 1), length)
    before = caches_of(executor)
    kept = (lengths[0] + 2, lengths[1], lengths[2] + 3)
    moves: tuple[tuple[int, ...], ...] = ((20, 22), (), (31, 32, 33))  # sources and targets overlap
    assert executor.run(StepPlan((), kept, moves)).slots == ()
    after = caches_of(executor)
    for slot, (end, moved) in enumerate(zip(kept, moves, strict=True)):
        rows = [*range(end - len(moved)), *moved]
        expected = before[:, slot, :, [HEADS + row for row in rows]]
        assert np.array_equal(after[:, slot, :, [*range(HEADS, HEADS + end)]], expected)


@given(length=st.integers(20, 60), data=st.data())
def test_the_host_moves_any_number_of_rows(tiny_session: Session, length: int, data: st.DataObject) -> None:
    """More rows than there are heads, where the graph has no part in it."""
    executor = tiny_session.executor
    assert isinstance(executor, OrtExecutor)
    count = data.draw(st.integers(1, 16))
    moves = tuple(sorted(data.draw(st.sets(st.integers(length - count, length + 30), min_size=count, max_size=count))))
    executor.caches[:] = np.arange(executor.layout.rows, dtype=np.float32)[:, None]
    executor.run(StepPlan((), (length,), (moves,)))
    expected = np.arange(executor.layout.rows)
    expected[HEADS + length - count : HEADS + length] = [HEADS + row for row in moves]
    assert (executor.caches == expected[:, None]).all()
    executor.caches[:] = 0


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_resting_slots_is_written_behind_what_they_keep(executors: Any, name: str) -> None:
    """The slot in the middle rests while its neighbours decode, verify trees and prefill."""
    executor, rng = executors[name], np.random.default_rng(1)
    lengths = [7, 12, 40]
    for slot, length in enumerate(lengths):
        prefill(executor, slot, rng.integers(0, VOCAB, length))
    before = caches_of(executor)[:, 1, :, HEADS : HEADS + 12].tobytes()
    others: list[Callable[[int], SlotRows]] = [
        lambda slot: SlotRows(slot, rng.integers(0, VOCAB, 1), ROOT_ONLY),
        lambda slot: SlotRows(slot, rng.integers(0, VOCAB, HEADS + 1), chain(HEADS), wanted=EVERYTHING),
        lambda slot: prefill_rows(slot, rng.integers(0, VOCAB, 16)),
    ]
    for first in others:
        for last in others:
            run(executor, StepPlan((first(0), last(2)), tuple(lengths), ((), (), ())))
            assert caches_of(executor)[:, 1, :, HEADS : HEADS + 12].tobytes() == before


# -- not a number --------------------------------------------------------------------------------------------------


def poison(executor: OrtExecutor | OrtDeviceExecutor, slot: int) -> None:
    """Make every row of a slot NaN: whatever attends to it is NaN from there on."""
    if isinstance(executor, OrtExecutor):
        executor.caches[:, slot] = np.nan
        return
    import ctypes

    for cache in executor.caches:
        shape = cache.shape()
        memory = (ctypes.c_float * int(np.prod(shape))).from_address(cache.data_ptr())
        np.ctypeslib.as_array(memory).reshape(shape)[slot] = np.nan


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_noticed_in_every_kind_of_step_and_in_its_own_slot_only(tiny_bundle: Path, name: str) -> None:
    model = ort_model(open_bundle(tiny_bundle), 2, "cpu" if name == "cpu" else "standard")
    executor = OrtDeviceExecutor(model, "cpu", threads=1) if name == "device" else OrtExecutor(model, threads=1)
    for slot in range(2):
        prefill(executor, slot, [5, 6, 7])
    assert run(executor, plain_plan(2, 1, 8, 3, Wanted(hidden=True)))[0].finite
    poison(executor, 1)
    plain = run(executor, plain_plan(2, 1, 8, 3, Wanted(hidden=True)))[0]
    assert plain.hidden is not None and np.isnan(plain.hidden).all()
    for wanted in (NO_OUTPUTS, Wanted(heads=True), Wanted(logits=True), EVERYTHING):
        for shape in (ROOT_ONLY, chain(2)):
            rows = [SlotRows(slot, np.arange(8, 8 + shape.rows), shape, wanted=wanted) for slot in range(2)]
            good, bad = run(executor, StepPlan(tuple(rows), (3, 3), ((), ())))
            assert (good.finite, bad.finite) == (True, False), (wanted, shape.rows)
        chunk = prefill_rows(1, np.arange(4), wanted)
        good, bad = run(executor, StepPlan((SlotRows(0, np.array([8]), ROOT_ONLY), chunk), (3, 3), ((), ())))
        assert (good.finite, bad.finite) == (True, False), wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_that_held_nan_serves_its_next_prompt(tiny_bundle: Path, name: str) -> None:
    model = ort_model(open_bundle(tiny_bundle), 2, "cpu" if name == "cpu" else "standard")
    executor = OrtDeviceExecutor(model, "cpu", threads=1) if name == "device" else OrtExecutor(model, threads=1)
    expected = [prefill(executor, slot, [5, 6, 7 + slot]).next_token for slot in range(2)]
    poison(executor, 1)
    assert not run(executor, plain_plan(2, 1, 8, 3))[0].finite
    neighbour = caches_of(executor)[:, 0].tobytes()
    again = prefill(executor, 1, [5, 6, 8])
    assert again.finite and again.next_token == expected[1]
    assert caches_of(executor)[:, 0].tobytes() == neighbour


def test_a_call_that_fails_fails_its_own_slot_alone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = OrtExecutor(ort_model(open_bundle(tiny_bundle), 3, "standard"), threads=1)  # one call a slot
    for slot in range(3):
        prefill(executor, slot, [5, 6, 7])
    plan = StepPlan(tuple([SlotRows(slot, np.array([8 + slot]), ROOT_ONLY) for slot in range(3)]), (3, 3, 3), ((), (), ()))
    expected = [result.next_token for result in run(executor, plan)]
    call, error = OrtExecutor._call, RuntimeError("the engine broke")

    def failing(self: OrtExecutor, bound: Any, rows: SlotRows, length: int) -> None:
        if rows.slot == 1:
            raise error
        call(self, bound, rows, length)

    monkeypatch.setattr(OrtExecutor, "_call", failing)
    first, second, third = executor.run(plan).slots
    assert second is error
    assert isinstance(first, SlotResult) and isinstance(third, SlotResult)
    assert [first.next_token, third.next_token] == [expected[0], expected[2]]
    error = AssertionError("our own mistake")  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="our own mistake"):
        executor.run(plan)
