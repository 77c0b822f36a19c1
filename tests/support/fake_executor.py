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

from medusa_deploy.runtime import SamplingParams
from medusa_deploy.runtime.executors.executor import Abilities, CacheLayout
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, StepResult
from medusa_deploy.runtime.files.bundle import Bundle
from medusa_deploy.runtime.files.manifest import Manifest, TextFacts
from medusa_deploy.runtime.sampling import draw, scores, uniform, weights
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
    """See the module. A call is the decoding rows of all slots, or one prefill chunk.

    ``fail_at``: the number of the call that ends with ``error`` before it does anything. ``padded``: slots that rest get padding,
    as many rows as the step has, behind the rows that they keep. ``nan``: tokens that make NaN of all rows that see them.
    """

    def __init__(self, facts: Manifest, slots: int, *, seed: int = 0, padded: bool = False) -> None:
        backbone, heads = facts.backbone, facts.heads
        self.layout = CacheLayout(
            backbone.layers, slots, backbone.kv_heads, facts.limits.cache_rows, backbone.head_dim, facts.dtype
        )
        self.abilities = Abilities(slots, heads.num_heads, padded=padded, copies=True)
        self.engine_seconds = 0.0
        self.language = _language(backbone.vocab_size, heads.num_heads, heads.top_k, seed)
        self.calls = 0
        self.plans: list[StepPlan] = []
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("the engine failed")
        self.nan: frozenset[int] = frozenset()
        self._margin = heads.num_heads
        self._hidden_size = backbone.hidden_size
        self._tokens = np.full((slots, facts.limits.cache_rows), _NOTHING)
        self._positions = np.full((slots, facts.limits.cache_rows), _NOTHING)

    def run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        assert len({rows.slot for rows in plan.active}) == len(plan.active), "a slot has one entry"
        for slot, (length, moves) in enumerate(zip(plan.lengths, plan.moves, strict=True)):
            self._move(slot, length, moves)
        decoding = [rows for rows in plan.active if rows.forced == 1]
        found: dict[int, SlotResult | Exception] = {}
        for rows in [decoding] * bool(decoding) + [[rows] for rows in plan.active if rows.forced != 1]:
            found |= self._call(plan, rows)
        return StepResult(tuple([found[rows.slot] for rows in plan.active]))

    def propose(self, hidden: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates = np.stack([self.language.propose(int(h[0]), int(r)) for h, r in zip(hidden, root, strict=True)])
        return candidates, np.zeros(candidates.shape, np.float32)

    def copy(self, source: int, target: int, rows: int) -> None:
        end = self._margin + rows
        for cache in (self._tokens, self._positions):
            cache[target, self._margin : end] = cache[source, self._margin : end]

    def took(self, seconds: float) -> None:
        """The newest call took so long; tests make it up."""
        self.engine_seconds += seconds

    def _call(self, plan: StepPlan, active: list[SlotRows]) -> dict[int, SlotResult | Exception]:
        self.calls += 1
        if self.calls == self.fail_at:
            if isinstance(self.error, Exception):
                return {rows.slot: self.error for rows in active}
            raise self.error
        if self.abilities.padded:
            self._pad(plan, {rows.slot for rows in plan.active}, max(rows.count for rows in active))
        return {rows.slot: self._slot(rows, plan.lengths[rows.slot]) for rows in active}

    def _move(self, slot: int, length: int, moves: tuple[int, ...]) -> None:
        end = self._margin + length
        for cache in (self._tokens, self._positions):
            cache[slot, end - len(moves) : end] = cache[slot, [self._margin + row for row in moves]]

    def _pad(self, plan: StepPlan, active: set[int], rows: int) -> None:
        for slot, length in enumerate(plan.lengths):
            if slot not in active:
                for cache in (self._tokens, self._positions):
                    cache[slot, self._margin + length : self._margin + length + rows] = _NOTHING

    def _slot(self, rows: SlotRows, length: int) -> SlotResult:
        start, shape, wanted, language = self._margin + length, rows.shape, rows.wanted, self.language
        assert start + rows.count <= self.layout.rows
        assert rows.count == shape.rows and rows.forced in (1, rows.count)
        self._tokens[rows.slot, start : start + rows.count] = rows.tokens
        self._positions[rows.slot, start : start + rows.count] = length + shape.depths
        contexts = [self._context(rows, start, row) for row in range(rows.count)]
        states = np.array([language.state(context) for context in contexts])
        broken = np.array([bool(self.nan & set(context.tolist())) for context in contexts])
        last = self._accept(rows, states)
        kept = states[-1:] if rows.prefills else states
        logits = language.table[kept].copy()
        logits[broken[-len(kept) :]] = np.nan
        hidden = np.full((len(kept), self._hidden_size), np.nan, np.float32)
        hidden[:, 0] = kept
        token = int(language.table[states[last]].argmax())
        candidates = language.propose(int(states[last]), token) if wanted.heads else None
        return SlotResult(
            last_row=last,
            next_token=token,
            finite=not broken[last],
            candidates=candidates,
            log_probs=None if candidates is None else np.zeros(candidates.shape, np.float32),
            logits=logits if wanted.logits else None,
            hidden=hidden if wanted.hidden else None,
        )

    def _context(self, rows: SlotRows, start: int, row: int) -> np.ndarray:
        """Tokens that a row sees, in the order of their positions."""
        slot, position = rows.slot, int(start - self._margin + rows.shape.depths[row])
        seen = np.concatenate([np.arange(self._margin, start), start + np.flatnonzero(rows.shape.ancestors[row])])
        positions, tokens = self._positions[slot, seen], self._tokens[slot, seen]
        assert np.array_equal(np.sort(positions), np.arange(position + 1)), f"slot {slot} row {row} sees {positions.tolist()}"
        assert ((tokens >= 0) & (tokens < self.language.vocab)).all(), f"slot {slot} row {row} sees the tokens {tokens.tolist()}"
        return np.asarray(tokens[np.argsort(positions)])

    def _accept(self, rows: SlotRows, states: np.ndarray) -> int:
        """The deepest row whose path is made of greedy tokens, the first of several."""
        ancestors, last, deepest = rows.shape.ancestors, 0, 0
        for row in range(rows.count):
            path = np.flatnonzero(ancestors[row])
            drafted = [(path[i - 1], path[i]) for i in range(1, len(path)) if path[i] >= rows.forced]
            alive = all(rows.tokens[child] == self.language.table[states[parent]].argmax() for parent, child in drafted)
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
    padded: bool = False,
) -> FakeSession:
    """A session of the tiny model's sizes over a :class:`FakeExecutor`. It speaks text when there is a folder for its files."""
    facts = manifest(capacity=capacity, prefill_chunk=prefill_chunk, tree=tree)
    text = (
        TextFacts(eos_token_ids=eos_token_ids)
        if text_folder is None
        else write_text_files(text_folder, eos_token_ids=eos_token_ids)
    )
    facts = replace(facts, text=text)
    session = FakeSession(Bundle(text_folder or Path("nowhere"), facts), FakeExecutor(facts, slots, seed=seed, padded=padded))
    session.loop.clock = lambda: session.executor.engine_seconds  # what is chosen must not depend on this machine
    return session


class FakeSession(Session):
    """A session whose executor is known to be a fake one."""

    executor: FakeExecutor

    @property
    def language(self) -> FakeLanguage:
        return self.executor.language


def plain_reference(language: FakeLanguage, params: SamplingParams, prompt: list[int], count: int) -> list[int]:
    """One token at a time from the language itself: no engine, no slots, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        row = scores(params, language.table[language.state(tokens)], tokens, len(prompt))
        if params.mode == "sample":
            assert params.seed is not None
            tokens.append(draw(weights(params, row), uniform(params.seed, len(tokens))))
        else:
            tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]
