"""Counts how often a bundle's heads are right, on the engine at hand while it decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.drafting.draft import NOTHING, Candidates, Draft
from ...runtime.drafting.hits import NO_LABEL, path_rates, rank_rates, ranks_of, replayed_acceptance_length
from ...runtime.errors import TreeError, UsageError
from ...runtime.files.bundle import sha256
from ...runtime.files.json_file import read_json_file
from ...runtime.session import Session
from ...runtime.tree import MAX_ROWS, RankPath, Tree, expected_acceptance_length, tree_of_paths
from ..tree_set import MAX_FILE_BYTES

OVER_POSITIONS = "over all positions, by rates alone: decoding leaps over what was easy to guess, and accepts a few percent fewer"
"""Describes an expected acceptance length that wasn't replayed."""

_HINT = "give a file that medusa-deploy tree wrote"


class Recorder:
    """Drafts nothing while the heads run, so that every position becomes a root. Records what they propose there."""

    rows = 1
    heads = True

    def __init__(self, observe: Callable[[Candidates], object]) -> None:
        """Call ``observe`` with what the heads propose at each root."""
        self._observe = observe

    def draft(self, candidates: Candidates | None) -> Draft:
        """Draft the root alone."""
        assert candidates is not None
        self._observe(candidates)
        return NOTHING


@dataclass(frozen=True, slots=True)
class HitTable:
    """Hits of the heads at ``positions`` roots.

    ``rates`` float64 [K, k]: by head and rank. ``paths``: the most frequent paths of ranks, at most 511, with their rates.
    ``ranks`` int64 [positions + answers, K]: every count, as ``replayed_acceptance_length`` takes it; None where only the rates
    are known.
    """

    rates: np.ndarray
    paths: Mapping[RankPath, float]
    positions: int
    ranks: np.ndarray | None = None

    def acceptance_length(self, tree: Tree) -> float:
        """Expected tokens a step: replayed over what was counted, or else by the rates, which say a few percent too many."""
        if self.ranks is None:
            return expected_acceptance_length(tree, self.paths)
        return replayed_acceptance_length(tree, self.ranks)

    def to_json(self) -> dict[str, Any]:
        """The table as its file holds it; ``ranks`` has a line for each head."""
        pairs = [[list(path), round(rate, 6)] for path, rate in self.paths.items()]
        ranks = None if self.ranks is None else [" ".join(map(str, column)) for column in self.ranks.T.tolist()]
        return {"positions": self.positions, "rank_rates": self.rates.round(6).tolist(), "path_rates": pairs, "ranks": ranks}


def count_hits(
    session: Session,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> HitTable:
    """Decode the prompts greedily and compare each root's candidates with the tokens that the backbone then emitted.

    Raises:
        UsageError: the bundle has no heads, or nothing was decoded.
    """
    heads = session.manifest.heads
    if heads.num_heads == 0:
        raise UsageError("the bundle has no heads", hint="export it with --heads")
    ranks: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        ranks += _ranks_in_answer(session, prompt, max_new_tokens)
        progress(index + 1, f"{len(ranks)} positions")
    found = np.array(ranks)
    positions = int((found[:, 0] != NO_LABEL).sum())
    if not positions:
        raise UsageError("every prompt ended at its first token: there is nothing to count", hint="give other prompts")
    rates = path_rates(found)
    kept = {path: rates[path] for path in tree_of_paths(rates, MAX_ROWS).paths[1:]}
    return HitTable(rank_rates(found, heads.top_k), kept, positions, found)


def _ranks_in_answer(session: Session, prompt: list[int], max_new_tokens: int) -> list[list[int]]:
    """For each token of the answer, the ranks by head of the tokens that came after it; none after the last."""
    heads = session.manifest.heads
    tokens: list[int] = []
    seen: list[np.ndarray] = []
    recorder = Recorder(lambda found: seen.append(found.tokens))
    for chunk in session.stream(token_ids=prompt, max_new_tokens=max_new_tokens, drafter=recorder):
        tokens.extend(chunk.token_ids)
    followed = [ranks_of(candidates, tokens[at : at + heads.num_heads]) for at, candidates in enumerate(seen, start=1)]
    return [*followed, [NO_LABEL] * heads.num_heads]


def read_hit_table(path: Path) -> tuple[HitTable, dict[int, float], dict[str, Any]]:
    """Read the table of a tree file, its step times in ms by rows (maybe none), and the origins of both (``hits``, ``times``).

    Raises:
        TreeError: the file holds no such table, or times that can't be.
    """
    raw = read_json_file(path, limit=MAX_FILE_BYTES, error=TreeError, hint=_HINT)
    try:
        found = _table(raw["table"])
        former = dict(raw.get("provenance", {}))
        times = {str(rows): taken for rows, taken in raw.get("ms_by_rows", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TreeError(f"{path} holds no table of hit rates: {error!r}", hint=_HINT) from None
    # Earlier files don't tell what was counted from what was timed: one run did both.
    hits, timed = former.get("hits", former), former.get("times", {key: former[key] for key in former if key == "environment"})
    source = {"table": {"file": str(path), "sha256": sha256(path)}}
    checked = _step_times(path, times)
    return found, checked, {"hits": hits | source} | ({"times": timed | source} if checked else {})


def _table(raw: Mapping[str, Any]) -> HitTable:
    """Read a table from its JSON form and check it. ValueError and its kin tell what is wrong."""
    rates = np.array(raw["rank_rates"], np.float64)
    paths = {tuple(int(rank) for rank in ranks): float(rate) for ranks, rate in raw["path_rates"]}
    if rates.ndim != 2 or not rates.size:
        raise ValueError(f"rates by head and rank have the shape {rates.shape}")
    if not all(0 <= rate <= 1 for rate in (*rates.flat, *paths.values())):
        raise ValueError("a rate is not in 0 … 1")
    heads, ranks = rates.shape
    for ranked in paths:
        if not 1 <= len(ranked) <= heads or not all(0 <= rank < ranks for rank in ranked):
            raise ValueError(f"path {list(ranked)} is none of {heads} heads with {ranks} ranks")
        if ranked[:-1] and ranked[:-1] not in paths:
            raise ValueError(f"path {list(ranked)} has a rate, and {list(ranked[:-1])} has none")
    positions = int(raw["positions"])
    if positions < 1:
        raise ValueError(f"counted at {positions} positions")
    return HitTable(rates, paths, positions, _recorded(raw.get("ranks"), rates.shape, positions))


def _recorded(lines: Any, shape: tuple[int, ...], positions: int) -> np.ndarray | None:
    if lines is None:
        return None
    heads, most = shape
    ranks = np.array([[int(rank) for rank in line.split()] for line in lines], np.int64).T
    if ranks.shape[1:] != (heads,) or not ((ranks >= NO_LABEL) & (ranks < most)).all():
        raise ValueError(f"ranks aren't those of {heads} heads with {most} ranks")
    if (ranks[:, 0] != NO_LABEL).sum() != positions:
        raise ValueError(f"ranks aren't those of {positions} positions")
    return ranks


def _step_times(path: Path, raw: Mapping[str, Any]) -> dict[int, float]:
    times = {}
    for rows, taken in raw.items():
        if not rows.isdecimal() or rows == "0" or type(taken) not in (int, float) or not 0 < taken < math.inf:
            raise TreeError(
                f"{path}: a step of {rows} rows can't take {taken} ms",
                hint="take ms_by_rows out of the file, and give BUNDLE to measure it again",
            )
        times[int(rows)] = float(taken)
    return times
