"""Masks and acceptance of the step graph, against the rules written out as loops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.tree import Tree, chain
from support.trees import prefix_closed

torch: Any = pytest.importorskip("torch")
step: Any = pytest.importorskip("medusa_deploy.export.trace.step")

_DTYPES = ["float32", "float16"]
_TOKENS = 3  # few token ids, so that rows often match by chance, and id 0 (what padding holds) is a real one


@dataclass
class Step:
    """Inputs of one step; slot b has ``trees[b]`` in its first rows and padding after them."""

    trees: list[Tree]
    tokens: np.ndarray  # [B, N]
    greedy: np.ndarray  # [B, N]
    ancestors: np.ndarray  # [B, N, N]
    forced: np.ndarray  # [B]


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    trees = draw(st.lists(prefix_closed(max_rows=10).map(Tree.from_choices), min_size=1, max_size=3))
    idle = draw(st.lists(st.booleans(), min_size=len(trees), max_size=len(trees)))
    rows = max(tree.rows for tree in trees) + draw(st.integers(0, 3))
    shape = (len(trees), rows)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    tokens, greedy = rng.integers(0, _TOKENS, shape), rng.integers(0, _TOKENS, shape)
    ancestors = np.zeros((*shape, rows), bool)
    forced = np.zeros(len(trees), np.int64)
    for slot, tree in enumerate(trees):
        tokens[slot, tree.rows :] = 0
        # What makes a row padding is that it isn't its own ancestor; whatever else it claims must not count.
        ancestors[slot, tree.rows :] = rng.random((rows - tree.rows, rows)) < 0.5
        np.fill_diagonal(ancestors[slot], False)
        if not idle[slot]:
            ancestors[slot, : tree.rows, : tree.rows] = tree.ancestors
            forced[slot] = draw(st.integers(1, tree.rows)) if tree == chain(tree.depth) else 1
    return Step(trees, tokens, greedy, ancestors, forced)


def _naive_last_row(tree: Tree, tokens: np.ndarray, greedy: np.ndarray, forced: int) -> int:
    """The deepest row whose drafted tokens are each the argmax of the row above; the first of several; 0 in an idle slot."""
    if forced == 0:
        return 0
    best = 0
    for row in range(tree.rows):
        path = [0, *tree.row_paths[row]]
        alive = all(child < forced or tokens[child] == greedy[parent] for parent, child in itertools.pairwise(path))
        if alive and tree.depths[row] > tree.depths[best]:
            best = row
    return best


def _accept(case: Step, dtype: str = "float32") -> list[int]:
    arrays = (case.tokens, case.greedy, case.ancestors, case.forced)
    last: list[int] = step.accept(*(torch.from_numpy(np.asarray(array)) for array in arrays), getattr(torch, dtype)).tolist()
    return last


@pytest.mark.parametrize("dtype", _DTYPES)
@given(case=_steps())
def test_the_deepest_accepted_row_is_the_naive_one(dtype: str, case: Step) -> None:
    slots = zip(case.trees, case.tokens, case.greedy, case.forced.tolist(), strict=True)
    assert _accept(case, dtype) == [_naive_last_row(*slot) for slot in slots]


def _one(tree: Tree, tokens: list[int], greedy: list[int], *, forced: int = 1) -> Step:
    rows = len(tokens)
    ancestors = np.zeros((1, rows, rows), bool)
    ancestors[0, : tree.rows, : tree.rows] = tree.ancestors
    return Step([tree], np.array([tokens]), np.array([greedy]), ancestors, np.array([forced]))


def test_a_padding_row_is_never_accepted_even_where_its_token_fits() -> None:
    """The pad token 0 is what the root's row predicts: an implementation that follows pads accepts one."""
    assert _accept(_one(chain(1), [5, 7, 0, 0], [0, 0, 0, 0])) == [0]
    assert _accept(_one(chain(0), [5, 0, 0, 0], [0, 0, 0, 0])) == [0]


def test_a_row_below_a_refused_row_is_refused() -> None:
    assert _accept(_one(chain(3), [9, 1, 2, 3], [1, 5, 3, 4])) == [1]
    assert _accept(_one(chain(3), [9, 1, 2, 3], [0, 2, 3, 4])) == [0]
    assert _accept(_one(chain(3), [9, 1, 2, 3], [1, 2, 3, 4])) == [3]


def test_the_longer_path_wins_over_the_better_rank() -> None:
    tree = Tree.from_choices([(0,), (1,), (1, 0)])
    assert _accept(_one(tree, [9, 4, 4, 6], [4, 0, 6, 0])) == [3]


def test_the_whole_chunk_is_accepted_in_prefill_with_one_row_of_logits() -> None:
    rows = 7
    case = _one(chain(rows - 1), list(range(rows)), [0], forced=rows)
    assert _accept(case) == [rows - 1]


def _naive_visible(case: Step, margin: int, lengths: list[int], columns: int) -> np.ndarray:
    """[B, N, T]: committed rows, and this step's rows that are ancestors."""
    slots, rows = case.tokens.shape
    visible = np.zeros((slots, rows, columns), bool)
    for slot in range(slots):
        start = margin + lengths[slot]
        for row in range(rows):
            for column in range(columns):
                committed = margin <= column < start
                inside = start <= column < start + rows
                visible[slot, row, column] = committed or (inside and case.ancestors[slot, row, column - start])
    return visible


@pytest.mark.parametrize("dtype", _DTYPES)
@given(case=_steps(), margin=st.integers(1, 4), data=st.data())
def test_a_row_sees_the_committed_rows_and_its_ancestors(dtype: str, case: Step, margin: int, data: st.DataObject) -> None:
    slots, rows = case.tokens.shape
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=slots, max_size=slots))
    columns = margin + max(lengths) + rows + data.draw(st.integers(0, 5))
    write_index = torch.tensor([margin + length for length in lengths])
    mask = step.visibility_mask(
        torch.from_numpy(case.ancestors), write_index, torch.arange(columns), margin, getattr(torch, dtype)
    )
    assert mask.shape == (slots, 1, rows, columns) and mask.dtype == getattr(torch, dtype)
    assert set(mask.unique().tolist()) <= {0.0, step.HIDDEN_BIAS}
    assert torch.isfinite(mask).all()
    assert np.array_equal(mask[:, 0].numpy() == 0, _naive_visible(case, margin, lengths, columns))


def test_a_mask_as_a_picture() -> None:
    """Margin 1, two committed rows, then the rows of a root with two children; the last two columns are never written."""
    tree = Tree.from_choices([(0,), (1,)])
    mask = step.visibility_mask(torch.from_numpy(tree.ancestors)[None], torch.tensor([3]), torch.arange(8), 1, torch.float32)
    F, T = False, True
    assert (mask[0, 0] == 0).tolist() == [
        [F, T, T, T, F, F, F, F],
        [F, T, T, T, T, F, F, F],
        [F, T, T, T, F, T, F, F],
    ]


def test_a_window_as_a_picture() -> None:
    """The same with a window of 2 tokens. The children stand at one position, and a grandchild of the second one behind them."""
    tree = Tree.from_choices([(0,), (1,), (1, 0)])
    positions = 2 + torch.from_numpy(tree.depths)[None]
    arrays = (torch.from_numpy(tree.ancestors)[None], torch.tensor([3]), torch.arange(8))
    mask = step.visibility_mask(*arrays, 1, torch.float32, positions, 2)
    F, T = False, True
    assert (mask[0, 0] == 0).tolist() == [
        [F, F, T, T, F, F, F, F],
        [F, F, F, T, T, F, F, F],
        [F, F, F, T, F, T, F, F],
        [F, F, F, F, F, T, T, F],
    ]


# -- what the device graph adds ------------------------------------------------------------------------------------

_HEADS, _TOP_K = 5, 4


@given(case=_steps().filter(lambda case: max(tree.depth for tree in case.trees) <= _HEADS), seed=st.integers(0, 1 << 30))
def test_the_next_step_is_what_the_host_would_have_prepared(case: Step, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, rows = case.tokens.shape
    positions, write_index = rng.integers(0, 90, (slots, rows)), rng.integers(_HEADS, 90, slots)
    next_token, candidates = rng.integers(0, 50, (slots, 1)), rng.integers(0, 50, (slots, _HEADS, _TOP_K))
    fills = rng.integers(0, _HEADS * _TOP_K, (slots, rows))
    last = np.array(_accept(case))
    given_ones = (case.tokens, positions, case.ancestors, case.forced, write_index, fills, last, next_token, candidates)
    results = step.close(*(torch.from_numpy(np.asarray(array)) for array in given_ones))
    emitted, tokens, next_positions, next_index, kept, kept_count = (result.numpy() for result in results)
    for slot, tree in enumerate(case.trees):
        path = [] if case.forced[slot] == 0 else list(tree.row_paths[last[slot]])
        moved = 0 if case.forced[slot] == 0 else 1 + len(path)
        new = [*case.tokens[slot, path], next_token[slot, 0]][:moved]
        assert emitted[slot].tolist() == new + [-1] * (_HEADS + 1 - moved)
        assert next_index[slot] == write_index[slot] + moved
        assert kept_count[slot] == len(path) and kept[slot, : len(path)].tolist() == path
        assert next_positions[slot].tolist() == (positions[slot] + moved).tolist()
        assert tokens[slot].tolist() == [next_token[slot, 0], *candidates[slot].ravel()[fills[slot, 1:]]]
