"""Drafts of a request with a grammar: what it refuses takes no row, and what it forces is certain."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import count as counting

import numpy as np

from ..grammar import Matcher
from .draft import NOTHING, Candidates, Draft, Drafter, TokenPath, WrappedDrafter, compiled

_SUREST = 0.98
"""Highest probability of a candidate beside which the grammar allows others."""

_HINGES = 6
"""Hinges that are remembered; a JSON answer has about so many."""


class Guide:
    """Knows which candidates the grammar of one request allows, and learns which of its own tokens an answer repeats.

    A *hinge* is a chosen token behind which the grammar forces others: the end of a string is one, because the next name follows
    it. Heads that were trained on free text seldom propose it. Its probability is the rate at which the answer chose it where it
    could. The guide stands in for its matcher, so that it sees what is emitted.
    """

    def __init__(self, matcher: Matcher, deepest: int) -> None:
        """``deepest``: drafted tokens that a step can accept."""
        self.forced: set[TokenPath] = set()
        """Paths of the newest ranking whose last token was the only one that the grammar allowed."""
        self._matcher, self._deepest = matcher, deepest
        self._hinges: dict[int, list[int]] = {}  # the times that each was chosen, and could be; the newest last
        self._chosen: int | None = None  # the newest token, if the grammar left a choice

    # -- the matcher -----------------------------------------------------------------------------------------------

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray:
        """See :class:`..grammar.Matcher`."""
        return self._matcher.allowed(ahead)

    def admits(self, ahead: Sequence[int], token: int) -> bool:
        """See :class:`..grammar.Matcher`."""
        return self._matcher.admits(ahead, token)

    def only(self, ahead: Sequence[int] = ()) -> int | None:
        """See :class:`..grammar.Matcher`."""
        return self._matcher.only(ahead)

    def finished(self, ahead: Sequence[int] = ()) -> bool:
        """See :class:`..grammar.Matcher`."""
        return self._matcher.finished(ahead)

    def advance(self, tokens: Sequence[int]) -> None:
        """Take ``tokens`` as emitted; see which of them are hinges."""
        for place, token in enumerate(tokens):
            before = tokens[:place]
            if self._matcher.only(before) is not None:
                if self._chosen is not None and self._chosen not in self._hinges:
                    self._hinges[self._chosen] = [1, 2]
                    while len(self._hinges) > _HINGES:
                        del self._hinges[next(iter(self._hinges))]
                self._chosen = None
                continue
            for hinge, counts in self._hinges.items():
                if hinge == token or self._matcher.admits(before, hinge):
                    counts[0] += hinge == token
                    counts[1] += 1
            self._chosen = token
        self._matcher.advance(tokens)

    # -- drafts ----------------------------------------------------------------------------------------------------

    def ranked_paths(
        self,
        tokens: list[list[int]],
        chances: list[list[float]],
        continuation: list[tuple[int, float]],
        count: int,
        least: float = 0.0,
        deepest: int | None = None,
    ) -> list[tuple[TokenPath, float]]:
        """Return the ``count`` likeliest paths that the grammar allows; see :func:`.draft.ranked_paths`.

        Forced tokens have the probability 1 behind the path that forces them, also where no source proposes anything.
        ``deepest``: tokens of a path, where they are fewer than a step can accept.
        """
        self.forced.clear()
        most = self._deepest if deepest is None else min(deepest, self._deepest)
        text = [token for token, _ in continuation]
        found: list[tuple[TokenPath, float]] = []
        order = counting()  # of equal ones, the first to come
        open_paths: list[tuple[float, int, TokenPath]] = [(-1.0, next(order), ())]
        while open_paths and len(found) < count:
            negative, _, path = heapq.heappop(open_paths)
            if path:
                found.append((path, -negative))
            depth = len(path)
            if depth >= most or len(found) == count or self._matcher.finished(path):
                continue
            children = self._forced(path)
            if children is None:
                proposed = dict(zip(tokens[depth], chances[depth], strict=True)) if depth < len(tokens) else {}
                if depth < len(text) and list(path) == text[:depth]:
                    before = continuation[depth - 1][1] if depth else 1.0
                    rate = continuation[depth][1] / before if before > 0 else 0.0
                    proposed[text[depth]] = 1 - (1 - proposed.get(text[depth], 0.0)) * (1 - rate)
                children = self._allowed(path, proposed)
            for token, chance in children.items():
                if -negative * chance >= least:
                    heapq.heappush(open_paths, (negative * chance, next(order), (*path, token)))
        return found

    def pruned(self, draft: Draft, rows: int) -> Draft:
        """Return the draft without what the grammar refuses; forced tokens take the free ones of ``rows`` rows."""
        paths: list[TokenPath] = [()]
        for row, token in enumerate(draft.tokens.tolist(), start=1):
            parent = self._path(draft, int(draft.shape.parents[row]))
            if parent in paths and (*parent, token) not in paths and self._matcher.admits(parent, token):
                paths.append((*parent, token))
        waiting = deque(paths)
        while waiting and len(paths) < rows:
            path = waiting.popleft()
            token = self._matcher.only(path) if len(path) < self._deepest else None
            if token is not None and (*path, token) not in paths:
                paths.append((*path, token))
                waiting.append(paths[-1])
        return compiled(paths[1:], looked_up=draft.looked_up)

    def _path(self, draft: Draft, row: int) -> TokenPath:
        return tuple([int(draft.tokens[each - 1]) for each in draft.shape.row_paths[row]])

    def _forced(self, path: TokenPath) -> dict[int, float] | None:
        token = self._matcher.only(path)
        if token is None:
            return None
        self.forced.add((*path, token))
        return {token: 1.0}

    def _allowed(self, path: TokenPath, proposed: dict[int, float]) -> dict[int, float]:
        """Return the proposed tokens that may follow. The probability of the refused ones is shared out among all others."""
        allowed = {token: chance for token, chance in proposed.items() if self._matcher.admits(path, token)}
        left = 1 - sum(proposed.values()) + sum(allowed.values())
        found = {token: min(chance / left, _SUREST) for token, chance in allowed.items()} if left > 0 else allowed
        for hinge, (chosen, possible) in self._hinges.items():
            rate = chosen / (possible + 1)
            if rate > found.get(hinge, 0.0) and self._matcher.admits(path, hinge):
                found[hinge] = rate
        return found


class GuidedDrafter(WrappedDrafter):
    """Passes on what ``drafter`` drafts, as far as the grammar allows it."""

    def __init__(self, drafter: Drafter, guide: Guide) -> None:
        super().__init__(drafter)
        self._guide = guide

    def draft(self, candidates: Candidates | None) -> Draft:
        """Return the rows of the next step."""
        rows = self.rows
        draft = self._drafter.draft(candidates)
        return NOTHING if rows == 1 else self._guide.pruned(draft, rows)
