"""Counts how often the heads of two bundles are right at the same places of the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...runtime.drafting.hits import NO_LABEL, rank_rates, ranks_of
from ...runtime.session import Session
from ..measure.probe import Probe

_FEW = 5


def paired_hits(
    sessions: Mapping[str, Session],
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> dict[str, Any]:
    """Count each side's heads on texts of prompt and answer: the first candidate is right, or one of the first five.

    Both sides read the same answers, because answers of their own differ by more in difficulty than quantising costs. Heads guess
    what follows the token that their own backbone chooses. A place where any side chooses another token than the answer's is
    therefore left out on all sides. ``progress(done, note)`` follows sides and texts.
    """
    ranks: dict[str, list[list[int]]] = {name: [] for name in sessions}
    chosen: dict[str, list[int]] = {name: [] for name in sessions}
    done = 0
    for name, session in sessions.items():
        for prompt, answer in texts:
            _read(session, prompt, answer, ranks[name], chosen[name])
            progress(done := done + 1, f"{name.upper()}, {len(chosen[name])} positions")
    expected = [token for _, answer in texts for token in answer]
    kept = np.all([np.array(chosen[name]) == expected for name in sessions], axis=0)
    report: dict[str, Any] = {"positions": 0, "left_out": int((~kept).sum())}
    for name, session in sessions.items():
        found = np.array(ranks[name])[kept]
        rates = rank_rates(found, session.manifest.heads.top_k)
        report[name] = {"top1": rates[:, 0].tolist(), "top5": rates[:, :_FEW].sum(1).tolist()}
        report["positions"] = int((found[:, 0] != NO_LABEL).sum())
    return report


def _read(session: Session, prompt: Sequence[int], answer: Sequence[int], ranks: list[list[int]], chosen: list[int]) -> None:
    """Feed the text row by row, as plain decoding does. Append the backbone's tokens, and the ranks of what comes after them."""
    heads = session.manifest.heads.num_heads
    with Probe(session) as probe:
        probe.restart(prompt[:-1])
        for index, token in enumerate([prompt[-1], *answer[:-1]]):
            next_token, candidates = probe.candidates(token)
            chosen.append(next_token)
            ranks.append(ranks_of(candidates, answer[index + 1 : index + 1 + heads]))
