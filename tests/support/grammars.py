"""Grammars that need no package: what may follow is a function of the tokens before it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medusa_deploy.runtime import Grammar
from medusa_deploy.runtime.errors import GrammarError
from support.tiny import VOCAB


@dataclass
class HashedMatcher:
    """Allows some tokens, or one, or only the end, as a hash of the tokens says.

    ``ends_after``: tokens after which nothing but the end may follow. ``dead_end``: tokens after which nothing may follow at all.
    """

    seed: int = 0
    eos: frozenset[int] = frozenset()
    ends_after: int = 10_000
    dead_end: int | None = None
    emitted: list[int] = field(default_factory=list)
    asked: int = 0

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray:
        self.asked += 1
        tokens = [*self.emitted, *ahead]
        assert not self.finished(ahead), "nobody asks behind the end"
        if len(tokens) == self.dead_end:
            raise GrammarError("the grammar allows no further token", hint="test")
        return self._mask(tokens)

    def _mask(self, tokens: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(repr(list(tokens)).encode())])
        kind = rng.integers(4)
        mask = np.zeros(VOCAB, bool)
        mask[rng.integers(3, VOCAB, size=1 if kind < 2 else 5 if kind == 2 else 60)] = True
        mask[list(self.eos)] = kind == 3
        return mask

    def admits(self, ahead: Sequence[int], token: int) -> bool:
        try:
            return self._reaches(ahead) and not self.finished(ahead) and bool(self.allowed(ahead)[token])
        except GrammarError:
            return False

    def only(self, ahead: Sequence[int] = ()) -> int | None:
        try:
            mask = self.allowed(ahead) if self._reaches(ahead) and not self.finished(ahead) else None
        except GrammarError:
            return None
        return int(mask.argmax()) if mask is not None and mask.sum() == 1 else None

    def finished(self, ahead: Sequence[int] = ()) -> bool:
        return (bool(ahead) and ahead[-1] in self.eos) or len(self.emitted) + len(ahead) >= self.ends_after

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            assert self._mask(self.emitted)[token], "a token was emitted that the grammar refuses"
            self.emitted.append(token)

    def _reaches(self, ahead: Sequence[int]) -> bool:
        return all(self._mask([*self.emitted, *ahead[:place]])[token] for place, token in enumerate(ahead))


class HashedGrammars:
    """Takes the place of a session's compiler. A grammar's source is the seed, where it ends, and its dead end."""

    def __init__(self) -> None:
        self.made: list[HashedMatcher] = []
        self.unspaced = {token: token - 1 for token in range(10, 40, 2)}

    def matcher(self, grammar: Grammar, eos_token_ids: frozenset[int]) -> HashedMatcher:
        seed, ends_after, dead_end = grammar.source.split()
        made = HashedMatcher(int(seed), eos_token_ids, int(ends_after), None if dead_end == "-" else int(dead_end))
        self.made.append(made)
        return made


def hashed(seed: int, ends_after: int = 10_000, dead_end: int | None = None) -> Grammar:
    """The grammar of a :class:`HashedMatcher`."""
    return Grammar("regex", f"{seed} {ends_after} {'-' if dead_end is None else dead_end}")
