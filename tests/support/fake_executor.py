"""An executor in plain numpy whose caches hold tokens instead of keys and values.

What a row may look at is therefore readable: every row checks that it sees each position before its own exactly once, and its
logits are a function of the tokens found there. A wrong mask, position, cache row or commit raises, or changes the output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medusa_deploy.runtime.executors.executor import CacheLayout, StepBuffers, Wanted, chain_ancestors, visible_rows
from medusa_deploy.runtime.files.bundle import Bundle
from medusa_deploy.runtime.files.manifest import Manifest, TextFacts
from medusa_deploy.runtime.session import Session
from medusa_deploy.runtime.tree import Tree
from support.records import manifest
from support.text import write_text_files

_STATES = 4099
_NOTHING = -1


class FakeLanguage:
    """A deterministic language model: a context is folded to one of ``_STATES`` numbers, which has fixed logits.

    Heads know the right continuation: head k has it at a rank that depends on the context, the first one half of the time.
    """

    def __init__(self, vocab: int, heads: int, top_k: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.vocab, self.heads, self.top_k = vocab, heads, top_k
        self.table = rng.normal(0, 3, (_STATES, vocab)).astype(np.float32)
        self._powers = np.array([pow(31, power, _STATES) for power in range(1024)])
        self._ranks = rng.geometric(0.5, (_STATES, heads)) - 1
        self._others = np.argsort(rng.random((_STATES, vocab)), axis=1)[:, : top_k + 1]

    def state(self, context: Sequence[int] | np.ndarray, state: int = 0) -> int:
        """The number of a context, or of one that goes on from ``state``: a polynomial in 31."""
        tokens = np.asarray(context, np.int64)
        powers = self._powers[len(tokens) :: -1]
        return int((state * powers[0] + (tokens + 7) @ powers[1:]) % _STATES)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely continuation."""
        state, emitted = self.state(prompt), []
        for _ in range(count):
            emitted.append(int(self.table[state].argmax()))
            state = self.state(emitted[-1:], state)
        return emitted

    def propose(self, state: int, root: int) -> np.ndarray:
        """Candidates int64 [K, k] after a context in ``state`` and the root token."""
        out = np.empty((self.heads, self.top_k), np.int64)
        state = self.state([root], state)
        for head in range(self.heads):
            right = int(self.table[state].argmax())
            out[head] = [token for token in self._others[state] if token != right][: self.top_k]
            if (rank := self._ranks[state, head]) < self.top_k:
                out[head, rank] = right
            state = self.state([right], state)
        return out


class FakeExecutor:
    """See the module. ``fail_at``: the number of the call (step or prefill) that raises ``error`` before it does anything."""

    def __init__(self, facts: Manifest, slots: int, *, seed: int = 0) -> None:
        backbone, heads = facts.backbone, facts.heads
        self.layout = CacheLayout(
            backbone.layers, slots, backbone.kv_heads, facts.limits.cache_rows, backbone.head_dim, facts.dtype
        )
        self.engine_seconds = 0.0
        self.language = _language(backbone.vocab_size, heads.num_heads, heads.top_k, seed)
        self.calls = 0
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("the engine failed")
        self._hidden_size = backbone.hidden_size
        self._tokens = np.full((slots, facts.limits.cache_rows), _NOTHING)
        self._positions = np.full((slots, facts.limits.cache_rows), _NOTHING)
        self._buffers: dict[tuple[int, Wanted], StepBuffers] = {}

    def buffers(self, rows: int, wanted: Wanted) -> StepBuffers:
        key = (rows, wanted)
        if key not in self._buffers:
            self._buffers[key] = self._allocate(self.layout.slots, rows, rows, wanted)
        return self._buffers[key]

    def step(self, buffers: StepBuffers, wanted: Wanted) -> None:
        assert buffers is self._buffers[buffers.rows, wanted]
        self._call(buffers, wanted, 0)

    def prefill(self, slot: int, tokens: np.ndarray, start: int, wanted: Wanted) -> StepBuffers:
        buffers = self._allocate(1, len(tokens), 1, wanted)
        buffers.idle(0, start)
        buffers.tokens[0] = tokens
        buffers.positions[0] = np.arange(start, start + len(tokens))
        buffers.ancestors[0] = chain_ancestors(len(tokens))
        buffers.forced[0] = len(tokens)
        self._call(buffers, wanted, slot)
        return buffers

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates = np.stack([self.language.propose(int(h[0]), int(r)) for h, r in zip(hidden, root, strict=True)])
        return candidates, np.zeros(candidates.shape, np.float32)

    def _allocate(self, slots: int, rows: int, logit_rows: int, wanted: Wanted) -> StepBuffers:
        sizes = (self.language.heads, self.language.top_k, self._hidden_size, self.language.vocab)
        return StepBuffers.allocate(slots, rows, logit_rows, *sizes, self.layout.dtype, wanted)

    def _call(self, buffers: StepBuffers, wanted: Wanted, first_slot: int) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        visible = visible_rows(buffers, self.layout.rows)
        # Outputs that weren't asked for, and rows that are padding, hold what must not be used.
        buffers.candidates[:] = _NOTHING
        buffers.logits[:] = np.nan
        buffers.hidden[:] = np.nan
        for index in range(len(buffers.tokens)):
            self._slot(buffers, index, first_slot + index, visible, wanted)

    def _slot(self, buffers: StepBuffers, index: int, slot: int, visible: int, wanted: Wanted) -> None:
        start, margin, rows = int(buffers.write_index[index]), buffers.commit.shape[1], buffers.rows
        assert margin <= start and start + rows <= visible <= self.layout.rows
        for cache, new in ((self._tokens, buffers.tokens), (self._positions, buffers.positions)):
            cache[slot, start - margin : start] = cache[slot, buffers.commit[index]]
            cache[slot, start : start + rows] = new[index]
        kept = buffers.logit_rows[index]
        states = np.zeros(rows, np.int64)
        for row in np.flatnonzero(np.diagonal(buffers.ancestors[index])).tolist():
            states[row] = self.language.state(self._context(buffers, index, slot, row))
            if row in kept:
                at = int(np.flatnonzero(kept == row)[0])
                if wanted.logits:
                    buffers.logits[index, at] = self.language.table[states[row]]
                if wanted.hidden:
                    buffers.hidden[index, at, 0] = states[row]
        last = self._accept(buffers, index, states)
        buffers.last_row[index] = last
        buffers.next_token[index] = self.language.table[states[last]].argmax()
        if wanted.heads and buffers.forced[index]:
            buffers.candidates[index] = self.language.propose(int(states[last]), int(buffers.next_token[index]))

    def _context(self, buffers: StepBuffers, index: int, slot: int, row: int) -> np.ndarray:
        """Tokens that a row sees, in the order of their positions."""
        start, margin = int(buffers.write_index[index]), buffers.commit.shape[1]
        seen = np.concatenate([np.arange(margin, start), start + np.flatnonzero(buffers.ancestors[index, row])])
        positions, tokens = self._positions[slot, seen], self._tokens[slot, seen]
        expected = np.arange(buffers.positions[index, row] + 1)
        assert np.array_equal(np.sort(positions), expected), f"slot {slot} row {row} sees the positions {positions.tolist()}"
        assert ((tokens >= 0) & (tokens < self.language.vocab)).all(), f"slot {slot} row {row} sees the tokens {tokens.tolist()}"
        return np.asarray(tokens[np.argsort(positions)])

    def _accept(self, buffers: StepBuffers, index: int, states: np.ndarray) -> int:
        """The deepest row whose path is made of greedy tokens, the first of several."""
        ancestors, last, deepest = buffers.ancestors[index], 0, 0
        for row in range(buffers.rows):
            path = np.flatnonzero(ancestors[row])
            drafted = [(path[i - 1], path[i]) for i in range(1, len(path)) if path[i] >= buffers.forced[index]]
            alive = all(buffers.tokens[index, child] == self.language.table[states[parent]].argmax() for parent, child in drafted)
            if alive and len(path) > deepest:
                last, deepest = row, len(path)
        return last


_language = functools.cache(FakeLanguage)


def fake_session(
    slots: int = 1,
    *,
    capacity: int = 256,
    prefill_chunk: int = 16,
    tree: Tree | None = None,
    eos_token_ids: tuple[int, ...] = (),
    text_folder: Path | None = None,
    seed: int = 0,
) -> FakeSession:
    """A session of the tiny model's sizes over a :class:`FakeExecutor`. It speaks text when there is a folder for its files."""
    facts = manifest(capacity=capacity, prefill_chunk=prefill_chunk, tree=tree)
    text = (
        TextFacts(eos_token_ids=eos_token_ids)
        if text_folder is None
        else write_text_files(text_folder, eos_token_ids=eos_token_ids)
    )
    facts = replace(facts, text=text)
    session = FakeSession(Bundle(text_folder or Path("nowhere"), facts), FakeExecutor(facts, slots, seed=seed), slots)
    session._decoder.clock = lambda: session.executor.engine_seconds  # what is chosen must not depend on this machine
    return session


class FakeSession(Session):
    """A session whose executor is known to be a fake one."""

    executor: FakeExecutor

    @property
    def language(self) -> FakeLanguage:
        return self.executor.language
