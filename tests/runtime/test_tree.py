"""Choices compile to trees or are refused; the best tree is found."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import TreeError
from medusa_deploy.runtime.tree import MAX_ROWS, ROOT_ONLY, RankPath, Shape, Tree, chain, tree_of_paths
from support.trees import prefix_closed

T, F = True, False


def test_the_worked_example_of_the_module() -> None:
    tree = Tree.from_choices([(0,), (1,), (0, 0)])
    assert tree.paths == ((), (0,), (1,), (0, 0))
    assert tree.parents.tolist() == [-1, 0, 0, 1]
    assert tree.depths.tolist() == [0, 1, 1, 2]
    assert tree.ancestors.tolist() == [
        [T, F, F, F],
        [T, T, F, F],
        [T, F, T, F],
        [T, T, F, T],
    ]


def test_the_check_vectors_of_the_reference_implementation() -> None:
    tree = Tree.from_choices([[0], [0, 0], [0, 1], [0, 2], [1], [1, 0], [1, 1], [1, 2]])
    top_k = 10
    flat = [0, *(1 + top_k * depth + rank for depth, rank in tree.slots.T.tolist())]
    assert flat == [0, 1, 2, 11, 12, 13, 11, 12, 13]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    leaves = [row for row in range(tree.rows) if row not in tree.parents]
    assert [[0, *tree.row_paths[row]] for row in reversed(leaves)] == [
        [0, 2, 8],
        [0, 2, 7],
        [0, 2, 6],
        [0, 1, 5],
        [0, 1, 4],
        [0, 1, 3],
    ]


@given(prefix_closed())
def test_any_prefix_closed_set_compiles_to_rows_in_breadth_order(choices: list[RankPath]) -> None:
    tree = Tree.from_choices(choices)
    assert tree.rows == len(choices) + 1
    assert list(tree.paths) == sorted([(), *choices], key=lambda path: (len(path), path))
    assert {tuple(path) for path in tree.choices()} == set(choices)
    assert tree.depth == max((len(path) for path in choices), default=0)
    for row, path in enumerate(tree.paths[1:], start=1):
        assert tree.paths[tree.parents[row]] == path[:-1]
        assert tree.parents[row] < row
        assert (tree.depths[row], tree.ranks[row]) == (len(path), path[-1])
        assert tree.slots[:, row - 1].tolist() == [len(path) - 1, path[-1]]
        assert [0, *tree.row_paths[row]] == np.flatnonzero(tree.ancestors[row]).tolist()


@given(prefix_closed())
def test_ancestors_are_the_transitive_closure_of_parents(choices: list[RankPath]) -> None:
    tree = Tree.from_choices(choices)
    reached = np.eye(tree.rows, dtype=bool)
    for row in range(1, tree.rows):
        reached[row, tree.parents[row]] = True
    for _ in range(tree.rows):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    assert np.array_equal(tree.ancestors, reached)


@given(prefix_closed())
def test_a_row_path_leads_from_below_the_root_to_the_row(choices: list[RankPath]) -> None:
    tree = Tree.from_choices(choices)
    for row in range(tree.rows):
        path = tree.row_paths[row]
        assert [tree.paths[step] for step in path] == [tree.paths[row][:length] for length in range(1, len(path) + 1)]
        assert len(path) == tree.depths[row]


@given(prefix_closed(), st.randoms())
def test_the_order_of_choices_does_not_matter(choices: list[RankPath], random: object) -> None:
    shuffled = list(choices)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert Tree.from_choices(shuffled) == Tree.from_choices(choices)


def test_root_only_and_chains() -> None:
    assert (ROOT_ONLY.rows, ROOT_ONLY.depth, ROOT_ONLY.choices()) == (1, 0, [])
    assert chain(0) == ROOT_ONLY
    assert chain(3).choices() == [[0], [0, 0], [0, 0, 0]]
    assert np.array_equal(chain(3).ancestors, np.tri(4, dtype=bool))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([(0,), (1, 0)], r"path \[1, 0\] has no parent \[1\]"),
        ([(0, 0, 0), (0,)], r"path \[0, 0, 0\] has no parent"),
        ([(0,), (0,)], r"path \[0\] occurs twice"),
        ([(0,), [0]], r"path \[0\] occurs twice"),
        ([(-1,)], "something other than ranks"),
        ([(0,), (0, 1.5)], "something other than ranks"),
        ([(True,)], "something other than ranks"),
        ([("0",)], "something other than ranks"),
        ([()], "is not a path"),
        ([0], "is not a path"),
        (["01"], "is not a path"),
        ([None], "is not a path"),
        ([(rank,) for rank in range(MAX_ROWS)], f"{MAX_ROWS + 1} rows is over the limit of {MAX_ROWS}"),
    ],
)
def test_a_broken_tree_is_refused_by_name(choices: list[RankPath], said: str) -> None:
    with pytest.raises(TreeError, match=said) as caught:
        Tree.from_choices(choices)
    assert caught.value.hint


def test_the_largest_tree_compiles() -> None:
    assert Tree.from_choices([(rank,) for rank in range(MAX_ROWS - 1)]).rows == MAX_ROWS


def test_a_tree_must_not_ask_heads_for_more_than_they_give() -> None:
    tree = Tree.from_choices([(0,), (3,), (3, 1)])
    tree.check_fits(heads=2, top_k=4)
    with pytest.raises(TreeError, match="2 deep, and there are 1 heads"):
        tree.check_fits(heads=1, top_k=4)
    with pytest.raises(TreeError, match="uses rank 3, and a head returns 3 candidates") as caught:
        tree.check_fits(heads=2, top_k=3)
    assert "--top-k 4" in caught.value.hint
    ROOT_ONLY.check_fits(heads=1, top_k=1)


@given(st.lists(st.tuples(*[st.integers(-1, 2)] * 3), min_size=1, max_size=12), st.integers(1, 5))
def test_the_tree_of_counted_paths_is_as_good_as_any(found: list[tuple[int, ...]], rows: int) -> None:
    """Counts as hits occur: a path is right whenever a longer one is."""
    right = [row[: row.index(-1)] if -1 in row else row for row in found]
    paths = {row[:depth] for row in right for depth in range(1, len(row) + 1)}
    counts = {path: sum(row[: len(path)] == path for row in right) / len(found) for path in paths}
    tree = tree_of_paths(counts, rows)
    assert tree.rows == min(rows, 1 + len(paths))
    closed = [
        chosen
        for chosen in itertools.combinations(paths, tree.rows - 1)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]
    best = max((sum(counts[path] for path in chosen) for chosen in closed), default=0.0)
    assert sum(counts[path] for path in tree.paths[1:]) == pytest.approx(best)


def test_heads_that_hit_together_make_a_deeper_tree() -> None:
    assert tree_of_paths({(0,): 0.4, (0, 0): 0.3, (1,): 0.2}, 3) == chain(2)
    assert tree_of_paths({(0,): 0.4, (0, 0): 0.1, (1,): 0.2}, 3) == Tree.from_choices([(0,), (1,)])


def test_shapes_that_are_kept_take_little_memory() -> None:
    small, large = (-1, *[0] * 7), (-1, *range(399))
    assert Shape.of(small) is Shape.of(small)
    gone = weakref.ref(Shape.of(large))
    gc.collect()
    assert gone() is None, "a shape of 400 rows takes a megabyte and a half"
