"""Checks the drafts of a drafter that somebody else wrote: what doesn't fit a step ends that request, and no other one."""

from __future__ import annotations

from ..errors import DraftError
from .draft import Candidates, Draft, Drafter, WrappedDrafter


class CheckedDrafter(WrappedDrafter):
    """Passes on what ``drafter`` drafts, if a step can take it: up to ``rows`` rows, up to ``deepest`` below each other."""

    def __init__(self, drafter: Drafter, rows: int, deepest: int, vocab_size: int) -> None:
        super().__init__(drafter)
        self._most, self._deepest, self._vocab_size = rows, deepest, vocab_size

    def draft(self, candidates: Candidates | None) -> Draft:
        """Return the drafter's rows.

        Raises:
            DraftError: they aren't a draft, or don't fit a step.
        """
        draft = self._drafter.draft(candidates)
        if not isinstance(draft, Draft):
            raise DraftError(f"a drafter returned a {type(draft).__name__}", hint="return a Draft")
        rows, tokens = draft.shape.rows, draft.tokens.tolist()
        if len(tokens) != rows - 1:
            raise DraftError(f"a draft of {rows} rows has {len(tokens)} tokens", hint="give a token for each row but the root")
        if rows > self._most or draft.shape.depth > self._deepest:
            raise DraftError(
                f"a draft of {rows} rows, {draft.shape.depth} deep; a step takes {self._most} rows, {self._deepest} deep",
                hint="draft fewer rows",
            )
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._vocab_size):
            raise DraftError(
                f"a draft has tokens {min(tokens)} … {max(tokens)}, the vocabulary 0 … {self._vocab_size - 1}",
                hint="draft tokens of the bundle's vocabulary",
            )
        return draft
