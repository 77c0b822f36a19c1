"""What a sequence could verify in its next step, and what came of it: the drafter whose number of rows is chosen every step."""

from __future__ import annotations

from itertools import accumulate

from ..files.heads import PlattScaling
from .acceptance_stats import Beliefs, Evidence
from .draft import NOTHING, Candidates, Draft, Scale, TokenPath, compiled, ranked_paths
from .lookup import PromptLookup

_SUREST = 0.98
"""No candidate is taken for surer, whatever its head says."""


class AutoRows:
    """The most promising rows, as many as :class:`.row_budget.RightSize` chooses: it sets ``rows`` and ``heads`` before a step.

    A path's chance is as :class:`.draft.BestRows` has it, times the trust in each head, and in lookup, that it comes from.
    """

    def __init__(
        self, scaling: PlattScaling, num_heads: int, lookup: PromptLookup | None, session: Beliefs, *, heads: bool
    ) -> None:
        """``session``: what the session holds true so far. ``heads``: whether the prefill must bring candidates."""
        self.rows = 1
        self.heads = heads
        self.probing = False
        self.beliefs = Beliefs(num_heads + 1, session)
        self.gains: list[float] = [0.0]
        """Tokens that 0, 1, 2 … rows below the root promise to add."""
        self._scale, self._num_heads, self._lookup = Scale(scaling), num_heads, lookup
        self._paths: list[TokenPath] = []
        self._candidates: list[tuple[list[int], list[float]]] = []  # of each head: tokens, and chances before trust
        self._continuation: list[tuple[int, float]] = []

    def rank(self, candidates: Candidates | None, deepest: int, count: int, least: float) -> list[float]:
        """Rank up to ``count`` paths of at most ``deepest`` tokens. Returns what lookup alone promises, as ``gains`` does.

        ``least``: chances below it aren't looked for among the heads' paths.
        """
        *of_heads, of_lookup = self.beliefs.trust()
        self._candidates, tokens, chances = [], [], []
        if candidates is not None and deepest > 0:
            tokens = candidates.tokens[:deepest].tolist()
            promised = self._scale.chances(candidates.log_probs[:deepest])
            self._candidates = list(zip(tokens, promised, strict=True))
            chances = [[min(p * trust, _SUREST) for p in row] for row, trust in zip(promised, of_heads, strict=False)]
        self._continuation = self._lookup.continuation(deepest) if self._lookup is not None and deepest > 0 else []
        continuation, before, rate = [], 1.0, 1.0
        for token, of_prefix in self._continuation:
            rate *= min(of_prefix / before * of_lookup, _SUREST)
            before = of_prefix
            continuation.append((token, rate))
        ranked = ranked_paths(tokens, chances, continuation, count, least)
        self._paths = [path for path, _ in ranked]
        self.gains = list(accumulate([chance for _, chance in ranked], initial=0.0))
        return list(accumulate([chance for _, chance in continuation], initial=0.0))

    def draft(self, candidates: Candidates | None) -> Draft:  # noqa: ARG002 - they were ranked before
        """The best of the ranked paths."""
        if self.rows == 1:
            return NOTHING
        return compiled(self._paths[: self.rows - 1], looked_up=bool(self._continuation))

    def tested(self, emitted: list[int], cost: float) -> Evidence:
        """What the step showed that emitted these tokens: each is right behind those before it, drafted or not."""
        trust = []
        for head, ((tokens, chances), token) in enumerate(zip(self._candidates, emitted, strict=False)):
            # Weighted by the promise itself: the line through the origin that fits best.
            came = chances[tokens.index(token)] if token in tokens else 0.0
            trust.append((head, came, sum([chance * chance for chance in chances])))
        before = 1.0
        for (guess, of_prefix), token in zip(self._continuation, emitted, strict=False):
            rate, before = of_prefix / before, of_prefix
            trust.append((self._num_heads, rate * (guess == token), rate * rate))
            if guess != token:
                break
        return Evidence(len(emitted), cost, trust)

    @property
    def has_candidates(self) -> bool:
        """Whether heads proposed something for the step that was ranked last."""
        return bool(self._candidates)

    def guessed(self, token: int) -> bool:
        """Whether this is the first head's best candidate."""
        return bool(self._candidates) and self._candidates[0][0][0] == token
