"""tree: counted on the engine, searched exactly, written so that every verb reads it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from medusa_deploy.runtime.drafting.hits import MISS, NO_LABEL, path_rates, ranks_of, replayed_acceptance_length
from medusa_deploy.runtime.errors import TreeError, UsageError
from medusa_deploy.runtime.files.bundle import sha256
from medusa_deploy.runtime.session import Session
from medusa_deploy.runtime.tree import Tree, chain, expected_acceptance_length
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.measure.hit_table import HitTable, Recorder, count_hits, read_hit_table
from medusa_deploy.tools.measure.tree_search import best_trees, search
from medusa_deploy.tools.prompt_source import random_prompts
from medusa_deploy.tools.tree_set import published_trees, read_tree_file, trees_for
from support.records import manifest


def best_by_force(rates: np.ndarray, rows: int) -> float:
    """The most expected tokens of all prefix-closed sets of ``rows`` - 1 paths."""
    heads, ranks = rates.shape
    paths = [path for depth in range(1, heads + 1) for path in itertools.product(range(ranks), repeat=depth)]
    value = {path: float(np.prod([rates[head, rank] for head, rank in enumerate(path)])) for path in paths}
    closed = (
        chosen
        for chosen in itertools.combinations(paths, min(rows - 1, len(paths)))
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    return 1 + max(sum(value[path] for path in chosen) for chosen in closed)


@given(shape=st.sampled_from([(1, 3), (2, 2), (2, 3), (3, 2)]), rows=st.integers(1, 5), data=st.data())
@settings(max_examples=40)
def test_the_searched_tree_is_as_good_as_the_best_of_all_trees(shape: tuple[int, int], rows: int, data: st.DataObject):
    values = st.floats(0, 1, allow_subnormal=False)
    flat = data.draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    rates = np.array(flat).reshape(shape)
    tree, promised = best_trees(rates, 5)[rows - 1]
    assert tree.rows <= rows
    assert promised == pytest.approx(best_by_force(rates, rows))
    own = 1 + sum(np.prod([rates[head, rank] for head, rank in enumerate(path)]) for path in tree.paths[1:])
    assert promised == pytest.approx(own)


def test_labels_are_ranked_and_missing_ones_told_from_wrong_ones():
    assert ranks_of(np.array([[5, 6], [7, 8], [1, 2]]), [6, 9]) == [1, MISS, NO_LABEL]


def test_what_is_counted_is_what_the_heads_proposed_and_the_backbone_emitted(tiny_session: Session):
    """Against a step-by-step account: candidates of plain positions, looked up in plain decoding's tokens."""
    (prompt,) = random_prompts(128, 256, 1, seed=3)
    plain = tiny_session.generate(token_ids=prompt, max_new_tokens=24, speculative=False).token_ids
    table = count_hits(tiny_session, [prompt], 24)
    rows = []
    for at in range(1, len(plain)):
        seen: list[np.ndarray] = []
        recorder = Recorder(lambda found, kept=seen: kept.append(found.tokens))
        tiny_session.generate(token_ids=prompt + plain[: at - 1], max_new_tokens=2, drafter=recorder, ignore_eos=True)
        rows.append(ranks_of(seen[0], plain[at : at + 3]))
    assert table.positions == len(rows) == len(plain) - 1
    assert table.paths == pytest.approx(path_rates(np.array(rows)))
    assert table.ranks is not None and table.ranks.tolist() == [*rows, [NO_LABEL] * 3]


# A head's rank at each token but the last of a few answers, and a tree.
ANSWERS = st.lists(st.lists(st.tuples(*[st.integers(MISS, 2)] * 3), max_size=12), min_size=1, max_size=4)
TREES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=6).map(
    lambda paths: Tree.from_choices({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)})
)


def recorded(answers: list[list[tuple[int, ...]]]) -> np.ndarray:
    """Ranks of all tokens in order: heads have no label past an answer's end, so its last token has none at all."""
    rows = [
        [rank if at + head < len(answer) else NO_LABEL for head, rank in enumerate((*answer, (0,) * 3)[at])]
        for answer in answers
        for at in range(len(answer) + 1)
    ]
    return np.array(rows)


def decoded(tree: Tree, answers: list[list[tuple[int, ...]]]) -> list[int]:
    """Tokens of each step that can't reach past its answer's end, one token after another."""
    emitted = []
    for answer in answers:
        at = 0
        while at + max(1, tree.depth) <= len(answer):
            path: tuple[int, ...] = ()
            while len(path) < tree.depth and (*path, answer[at][len(path)]) in tree.paths:
                path = (*path, answer[at][len(path)])
            emitted.append(1 + len(path))
            at += 1 + len(path)
    return emitted


@given(answers=ANSWERS, tree=TREES)
def test_a_replayed_tree_emits_what_decoding_step_by_step_does(answers: list[list[tuple[int, ...]]], tree: Tree):
    steps = decoded(tree, answers)
    found = replayed_acceptance_length(tree, recorded(answers))
    assert found == pytest.approx(np.mean(steps)) if steps else 1 <= found <= 1 + tree.depth


def test_what_decoding_leaps_over_is_not_averaged_in():
    """A token that is hard to guess, then three at which two are guessed: decoding leaps over two of these three."""
    ranks = recorded([[(MISS, MISS, MISS), *[(0, 0, MISS)] * 3] * 25])
    assert expected_acceptance_length(chain(2), path_rates(ranks)) == pytest.approx(2.5, abs=0.03)
    assert replayed_acceptance_length(chain(2), ranks) == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize("choices", [[(0,)], [(0,), (0, 0), (0, 0, 0)], [(0,), (1,), (0, 1), (1, 0)], [(3,), (2,), (2, 0)]])
def test_the_expected_length_is_that_of_decoding_the_same_prompts(tiny_session: Session, choices: list[tuple[int, ...]]):
    prompts, tree = random_prompts(128, 256, 4, seed=5), Tree.from_choices(choices)
    expected = count_hits(tiny_session, prompts, 60).acceptance_length(tree)
    steps = []
    for prompt in prompts:
        chunks = [len(chunk.token_ids) for chunk in tiny_session.stream(token_ids=prompt, max_new_tokens=60, tree=tree)]
        begun, total = 0, sum(chunks)
        for before, tokens in itertools.pairwise(chunk for chunk in chunks if chunk):
            begun += before
            if begun + tree.depth <= total:
                steps.append(tokens)
    assert expected == pytest.approx(np.mean(steps))


def test_a_drafter_excludes_other_ways_to_choose_rows(tiny_session: Session):
    with pytest.raises(UsageError, match="a drafter and tree"):
        tiny_session.generate(token_ids=[1], drafter=Recorder(lambda _found: None), tree=chain(1))


def test_the_size_is_chosen_by_tokens_over_time_and_can_be_forced():
    table = HitTable(np.array([[0.5, 0.2]]), {(0,): 0.5, (1,): 0.2}, 10)
    assert search(table, {1: 1.0, 2: 1.1, 3: 2.0})["rows"] == 2
    assert search(table, {1: 1.0, 2: 1.6, 3: 1.6})["rows"] == 3
    assert search(table, {}, rows=3)["choices"] == [[0], [1]]
    with pytest.raises(UsageError, match="no step times"):
        search(table, {})
    with pytest.raises(UsageError, match="4 rows"):
        search(table, {}, rows=4)


def test_the_verb_writes_what_other_verbs_read(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, plain, again = tmp_path / "tree.json", tmp_path / "choices.json", tmp_path / "again.json"
    options = ["--count", "6", "--max-new-tokens", "32", "--threads", "1"]
    assert main(["tree", str(tiny_bundle), *options, "-o", str(out), "--choices", str(plain), "--rows", "3"]) == 0
    assert "expected acceptance length" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert json.loads(plain.read_text()) == written["choices"]
    assert read_tree_file(out) == read_tree_file(plain) == Tree.from_choices(written["choices"])
    assert len(written["provenance"]["hits"]["environment"]["bundle"]["manifest_sha256"]) == 64
    assert len(written["provenance"]["hits"]["prompts_sha256"]) == 64
    assert main(["verify", str(tiny_bundle), "--trees", str(out), "--count", "1", "--max-new-tokens", "8"]) == 0
    assert main(["tree", "--table", str(out), "-o", str(again)]) == 0
    assert json.loads(again.read_text())["table"] == written["table"]
    assert written["expected_by"] == "replay"
    del written["table"]["ranks"]
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(written))
    capsys.readouterr()
    assert main(["tree", "--table", str(rates), "-o", str(tmp_path / "by-rates.json")]) == 0
    assert "by rates alone" in capsys.readouterr().out
    assert json.loads((tmp_path / "by-rates.json").read_text())["expected_by"] == "rates"
    assert main(["tree", "--table", str(out), "-o", str(again)]) == 1
    assert "--force" in capsys.readouterr().err


TABLE = {"positions": 4, "rank_rates": [[0.5, 0.25], [0.5, 0.0]], "path_rates": [[[0], 0.5], [[1], 0.25], [[0, 0], 0.25]]}


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {"choices": []},
        {"table": {"positions": 1, "rank_rates": [[2.0]], "path_rates": []}},
        {"table": TABLE | {"rank_rates": []}},
        {"table": TABLE | {"rank_rates": [[], []]}},
        {"table": TABLE | {"rank_rates": [[float("nan"), 0.25], [0.5, 0.0]]}},
        {"table": TABLE | {"path_rates": [[[0], float("nan")]]}},
        {"table": TABLE | {"path_rates": [[[2], 0.25]]}},
        {"table": TABLE | {"path_rates": [[[], 0.25]]}},
        {"table": TABLE | {"path_rates": [[[0, 0, 0], 0.25]]}},
        {"table": TABLE | {"path_rates": [[[0, 0], 0.25]]}},
        {"table": TABLE | {"positions": 0}},
        {"table": TABLE | {"positions": float("inf")}},
        {"table": TABLE, "provenance": [1]},
        {"table": TABLE | {"ranks": ["0 0 1 -1 -2"]}},
        {"table": TABLE | {"ranks": ["0 0 1 -1 -2", "0 -1 -1 -2"]}},
        {"table": TABLE | {"ranks": ["0 0 1 2 -2", "0 -1 -1 -2 -2"]}},
        {"table": TABLE | {"ranks": ["0 0 1 -3 -2", "0 -1 -1 -2 -2"]}},
        {"table": TABLE | {"ranks": ["0 0 1 -2", "0 -1 -1 -2"]}},
        {"table": TABLE | {"ranks": [1, 2]}},
        {"table": TABLE | {"ranks": []}},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, raw: Any):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(TreeError, match="no table") as caught:
        read_hit_table(path)
    assert caught.value.hint


@pytest.mark.parametrize("taken", [0, -1.0, float("nan"), float("inf"), None, "soon"])
def test_step_times_that_no_clock_gives_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: Any):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"table": TABLE, "ms_by_rows": {"1": 1.0, "2": taken}}))
    assert main(["tree", "--table", str(path), "-o", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().err
    assert "2 rows" in said and "hint: " in said
    assert not (tmp_path / "out.json").exists()


def test_what_was_counted_and_what_was_timed_are_told_apart(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    counted, timed, forced = (tmp_path / f"{name}.json" for name in ("counted", "timed", "forced"))
    options = ["--count", "2", "--max-new-tokens", "16", "--threads", "1"]
    assert main(["tree", str(tiny_bundle), *options, "-o", str(counted)]) == 0
    first = json.loads(counted.read_text())["provenance"]
    assert first["hits"]["environment"] == first["times"]["environment"] and "table" not in first["hits"]
    first["times"]["environment"]["cpu"] = first["hits"]["environment"]["cpu"] = "another machine"
    counted.write_text(json.dumps(json.loads(counted.read_text()) | {"provenance": first}))
    capsys.readouterr()
    assert main(["tree", str(tiny_bundle), "--table", str(counted), "--threads", "1", "-o", str(timed)]) == 0
    assert f"hit rates of {counted}" in capsys.readouterr().out
    second = json.loads(timed.read_text())["provenance"]
    assert second["hits"] == first["hits"] | {"table": {"file": str(counted), "sha256": sha256(counted)}}
    assert second["times"]["environment"]["cpu"] != "another machine"
    assert main(["tree", "--table", str(timed), "--rows", "2", "-o", str(forced)]) == 0
    third = json.loads(forced.read_text())["provenance"]
    assert third["times"] == second["times"] | {"table": third["hits"]["table"]}
    assert third["hits"]["environment"] == first["hits"]["environment"]


def test_a_file_that_does_not_tell_them_apart_made_both_in_one_run(tmp_path: Path):
    path = tmp_path / "x.json"
    written = {"table": TABLE, "provenance": {"environment": {"cpu": "A"}, "prompts": 3}}
    path.write_text(json.dumps(written))
    assert "times" not in read_hit_table(path)[2]
    path.write_text(json.dumps(written | {"ms_by_rows": {"1": 1.0}}))
    _, _, origin = read_hit_table(path)
    assert origin["hits"] == {"environment": {"cpu": "A"}, "prompts": 3, "table": {"file": str(path), "sha256": sha256(path)}}
    assert origin["times"]["environment"] == {"cpu": "A"}


@pytest.mark.parametrize(
    ("rates", "paths", "more", "said"),
    [
        ([[0.5] * 17], [[[rank], 0.5] for rank in range(17)], ["--rows", "18"], "18 rows, the bundle allows 16"),
        ([[0.5] * 5], [[[rank], 0.5] for rank in range(5)], ["--rows", "6"], "uses rank 4"),
        ([[0.5]] * 4, [[[0] * length, 0.5] for length in range(1, 5)], ["--rows", "5"], "4 deep"),
        ([[0.5]] * 4, [[[0] * length, 1.0] for length in range(1, 5)], [], "4 deep"),
    ],
)
def test_a_tree_that_the_bundle_can_not_run_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: Any, paths: Any, more: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("medusa_deploy.tools.measure.row_sweep.row_sweep", lambda *_, **__: {"ms_by_rows": {1: 1.0, 5: 1.0}})
    path, out = tmp_path / "table.json", tmp_path / "out.json"
    path.write_text(json.dumps({"table": {"positions": 2, "rank_rates": rates, "path_rates": paths}}))
    assert main(["tree", str(tiny_bundle), "--table", str(path), "-o", str(out), "--threads", "1", *more]) == 1
    shown = capsys.readouterr().err
    assert said in shown and "hint: " in shown
    assert not out.exists()


def test_too_many_rows_are_refused_before_anything_is_counted(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medusa_deploy.tools.measure.hit_table.count_hits", lambda *_: pytest.fail("counted"))
    assert main(["tree", str(tiny_bundle), "--rows", "17", "-o", str(tmp_path / "out.json")]) == 1
    assert "17 rows, the bundle allows 16" in capsys.readouterr().err


def test_every_published_tree_is_a_tree_and_is_found_by_its_name():
    assert len(published_trees()) == 9
    for name, choices in published_trees().items():
        assert Tree.from_choices(choices).rows == 64
        assert name in trees_for(manifest(), [name]).trees
