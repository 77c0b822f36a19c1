"""Prompt lookup: text that repeats itself is a draft.

It looks for the newest tokens of a sequence earlier in it, the longest match first, and drafts the tokens that followed there
(prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding; the same idea with references: arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Mapping

LONGEST_MATCH = 8
DEEPEST = 16

# fmt: off
RATES = (
    (0.19, 0.10, 0.06, 0.04, 0.03, 0.03, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01),
    (0.51, 0.31, 0.22, 0.17, 0.13, 0.11, 0.10, 0.09, 0.08, 0.07, 0.06, 0.06, 0.05, 0.05, 0.04, 0.04),
    (0.59, 0.43, 0.33, 0.26, 0.22, 0.19, 0.17, 0.15, 0.14, 0.12, 0.11, 0.10, 0.09, 0.09, 0.08, 0.07),
    (0.72, 0.56, 0.43, 0.36, 0.31, 0.28, 0.26, 0.23, 0.21, 0.19, 0.17, 0.16, 0.15, 0.14, 0.13, 0.12),
    (0.77, 0.60, 0.50, 0.44, 0.39, 0.35, 0.32, 0.29, 0.26, 0.23, 0.22, 0.20, 0.19, 0.17, 0.16, 0.15),
    (0.77, 0.65, 0.56, 0.51, 0.46, 0.41, 0.37, 0.33, 0.30, 0.28, 0.26, 0.24, 0.22, 0.21, 0.19, 0.18),
    (0.83, 0.72, 0.65, 0.58, 0.53, 0.48, 0.43, 0.39, 0.36, 0.33, 0.31, 0.29, 0.27, 0.25, 0.24, 0.21),
    (0.94, 0.89, 0.85, 0.81, 0.77, 0.74, 0.71, 0.69, 0.66, 0.64, 0.63, 0.61, 0.59, 0.58, 0.57, 0.56),
)
# fmt: on
"""``RATES[m - 1][d]``: rate at which the backbone emits the first d + 1 tokens after a match of m tokens (last row: 8 or more).

A script that was not kept counted them in SmolLM2-135M-Instruct's greedy answers of up to 200 tokens to 896 prompts, without the
prompts. A third of the matches were of 8 or more. The rates only rank these rows among the heads'; each request's own steps
calibrate them.
"""


class PromptLookup:
    """Finds earlier occurrences of a sequence's newest tokens.

    For every run of 1 … ``LONGEST_MATCH`` tokens it keeps the place behind the run's latest occurrence. Each token is indexed
    once, when the first question comes.
    """

    def __init__(self, tokens: list[int], deepest: int = DEEPEST, alike: Mapping[int, int] | None = None) -> None:
        """``tokens``: the sequence's own list, which may grow between calls. ``deepest``: most tokens that it drafts.

        ``alike``: tokens that match another one, such as a word with a space before it matches the word.
        """
        self._deepest = deepest
        self._tokens, self._alike = tokens, alike or {}
        self._keys: list[int] = tokens if alike is None else []
        self._indexed = 0
        self._next: dict[tuple[int, ...], int] = {}

    def continuation(self, depth: int = DEEPEST) -> list[tuple[int, float]]:
        """Return up to ``depth`` tokens that may follow the newest one, each with its :data:`RATES`; none without a match.

        An earlier occurrence that runs into the present goes on from its own beginning.
        """
        self._index()
        tokens = self._tokens
        length = len(tokens)
        for match in range(min(LONGEST_MATCH, length - 1), 0, -1):
            start = self._next.get(tuple(self._keys[length - match :]))
            if start is not None:
                rates = RATES[match - 1][: min(depth, self._deepest)]
                return [(tokens[start + step % (length - start)], rate) for step, rate in enumerate(rates)]
        return []

    def _index(self) -> None:
        """Enter the runs before each new token. The newest run gets its entry when a token follows it."""
        if self._keys is not self._tokens:
            self._keys += [self._alike.get(token, token) for token in self._tokens[len(self._keys) :]]
        for position in range(max(self._indexed, 1), len(self._tokens)):
            for match in range(1, min(LONGEST_MATCH, position) + 1):
                self._next[tuple(self._keys[position - match : position])] = position
        self._indexed = len(self._tokens)
