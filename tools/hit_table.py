"""Hit rates of a bundle's heads, counted on the engine at hand while it decodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bundle import sha256
from ..runtime.draft import Candidates, Draft
from ..runtime.errors import TreeError, UsageError
from ..runtime.hits import path_rates, rank_rates, ranks_of
from ..runtime.json_file import read_json_file
from ..runtime.session import Session
from ..runtime.tree import MAX_ROWS, RankPath, Tree, tree_of_paths

_MAX_FILE_BYTES = 1 << 20
_HINT = "give a file that medusa-deploy tree wrote"


class Recorder:
    """Drafts as little as leaves the heads running, the last candidate of the first head, and keeps what was proposed.

    That candidate is seldom right, so nearly every position becomes a root and is counted.
    """

    rows = 2
    heads = True

    def __init__(self, top_k: int, observe: Callable[[Candidates], object]) -> None:
        """``observe`` gets what the heads propose at each root."""
        self._tree, self._observe = Tree.from_choices([(top_k - 1,)]), observe

    def draft(self, candidates: Candidates | None) -> Draft:
        """One row below the root."""
        assert candidates is not None
        self._observe(candidates)
        return Draft(self._tree, candidates.tokens[:1, -1])


@dataclass(frozen=True, slots=True)
class HitTable:
    """``rates`` float64 [K, k] by head and rank; ``paths``: the most frequent paths of ranks, at most 511; ``positions``: n."""

    rates: np.ndarray
    paths: Mapping[RankPath, float]
    positions: int

    def to_json(self) -> dict[str, Any]:
        """As the file holds it."""
        pairs = [[list(path), round(rate, 6)] for path, rate in self.paths.items()]
        return {"positions": self.positions, "rank_rates": self.rates.round(6).tolist(), "path_rates": pairs}


def count_hits(
    session: Session,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> HitTable:
    """Decode the prompts greedily and compare each root's candidates with what the backbone then emitted.

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
    if not ranks:
        raise UsageError("every prompt ended at its first token: there is nothing to count", hint="give other prompts")
    found = np.array(ranks)
    rates = path_rates(found)
    kept = {path: rates[path] for path in tree_of_paths(rates, MAX_ROWS).paths[1:]}
    return HitTable(rank_rates(found, heads.top_k), kept, len(found))


def _ranks_in_answer(session: Session, prompt: list[int], max_new_tokens: int) -> list[list[int]]:
    """For each root of the answer: the ranks, by head, of the tokens that came after it."""
    heads = session.manifest.heads
    tokens: list[int] = []
    seen: list[tuple[int, np.ndarray]] = []
    recorder = Recorder(heads.top_k, lambda found: seen.append((len(tokens), found.tokens)))
    for chunk in session.stream(token_ids=prompt, max_new_tokens=max_new_tokens, drafter=recorder):
        tokens.extend(chunk.token_ids)
    return [ranks_of(candidates, tokens[at : at + heads.num_heads]) for at, candidates in seen]


def read_hit_table(path: Path) -> tuple[HitTable, dict[int, float], dict[str, Any]]:
    """The table of a tree file, step times in ms by rows if there are any, and where both come from (``hits``, ``times``).

    Raises:
        TreeError: the file holds no such table, or times that can't be.
    """
    raw = read_json_file(path, limit=_MAX_FILE_BYTES, error=TreeError, hint=_HINT)
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
    """A table from its JSON form, checked: ValueError and its kin tell what is wrong."""
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
    return HitTable(rates, paths, positions)


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
