"""The speculative loop: draft, verify, accept, emit. One call of :meth:`Decoder.step` is one engine call for all slots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from ..drafting.draft import Candidates
from ..drafting.row_budget import RightSize
from ..errors import NumericsError
from ..executors.executor import AheadExecutor, Executor, StepBuffers, Wanted
from .acceptance import Acceptance, accept
from .ahead import RunAhead
from .sequence import Sequence
from .slots import SlotPool


class Decoder:
    """Drives sequences through an executor.

    Invariants of a step, for each sequence: emitted = 1 + accepted; 0 ≤ accepted ≤ tree depth; the slot's length grows by
    1 + accepted; after an exception no length has moved.
    """

    def __init__(
        self, executor: Executor, slots: SlotPool, margin: int, prefill_chunk: int, right_size: RightSize | None = None
    ) -> None:
        """``right_size``: chooses for drafters that leave their rows open (None: there are none)."""
        self.executor = executor
        self.slots = slots
        self.right_size = right_size
        self.clock: Callable[[], float] = time.perf_counter
        self.margin = margin
        self.prefill_chunk = prefill_chunk
        # Of each slot: cache rows, accepted, that the next step copies to just before its own rows, whoever asks for that step.
        self._to_move: list[list[int]] = []
        self._all_in_place()
        self._ahead = RunAhead(executor, slots, margin) if isinstance(executor, AheadExecutor) else None

    def prefill(self, sequence: Sequence) -> list[int]:
        """Write the prompt into the sequence's slot, in chunks, and emit the first token. Returns [that token]."""
        started = time.perf_counter()
        self._leave()
        if self.right_size is not None:
            self.right_size.pause()
        prompt = np.asarray(sequence.tokens, np.int64)
        for start in range(0, len(prompt), self.prefill_chunk):
            chunk = prompt[start : start + self.prefill_chunk]
            wanted = self._wanted([sequence]) if start + len(chunk) == len(prompt) else Wanted()
            buffers = self.executor.prefill(sequence.slot, chunk, start, wanted)
        tokens = self._accept(sequence, buffers, 0).tokens
        self.slots.advance(sequence.slot, len(prompt))
        self._to_move[sequence.slot] = []
        sequence.stats.prompt_tokens = len(prompt)
        sequence.stats.prefill_seconds += time.perf_counter() - started
        return sequence.emit(tokens)

    def step(self, sequences: list[Sequence]) -> list[list[int]]:
        """One step of every sequence. Returns the tokens that each emitted."""
        started, engine = time.perf_counter(), self.executor.engine_seconds
        try:
            emitted = self._step(sequences)
        except BaseException:
            self._leave()
            raise
        for sequence in sequences:
            sequence.stats.decode_seconds += time.perf_counter() - started
            sequence.stats.engine_seconds += self.executor.engine_seconds - engine
        return emitted

    def _step(self, sequences: list[Sequence]) -> list[list[int]]:
        began = self.clock()
        if self.right_size is not None:
            self.right_size.plan(sequences)
        wanted = self._wanted(sequences)
        ahead = self._ahead if self._ahead is not None and self._ahead.suits(sequences) else None
        if ahead is not None:
            buffers = ahead.step(sequences, lambda wanted: self._fill(sequences, wanted))
        else:
            self._leave()
            buffers = self._fill(sequences, wanted)
            self.executor.step(buffers, wanted)
        # The rows are in place now, and where they were copied from is overwritten, even if the outcome is refused below.
        self._all_in_place()
        if wanted.heads and any(math.isnan(buffers.log_probs[sequence.slot, 0, 0]) for sequence in sequences):
            raise NumericsError("the engine returned NaN", hint="verify the bundle: medusa-deploy verify BUNDLE")
        accepted = [self._accept(s, buffers, s.slot) for s in sequences]
        emitted = [self._commit(s, outcome) for s, outcome in zip(sequences, accepted, strict=True)]
        if ahead is not None and ahead.in_flight:  # the next step, already under way, moves what was just accepted
            self._all_in_place()
        if self.right_size is not None:
            self.right_size.learn(sequences, accepted, self.clock() - began)
        return emitted

    def _fill(self, sequences: list[Sequence], wanted: Wanted) -> StepBuffers:
        """Say to the executor what the next step is."""
        buffers = self.executor.buffers(max(sequence.drafter.rows for sequence in sequences), wanted)
        self._idle_others(sequences, buffers)
        for sequence in sequences:
            self._draft(sequence, buffers)
        for slot, length in enumerate(self.slots.lengths.tolist()):
            buffers.move(slot, length, self._to_move[slot] if length else [])  # what a slot's last holder left is nobody's
        return buffers

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's slot back; a step of it that is in flight is discarded."""
        if self._ahead is not None and self._ahead.awaits(sequence):
            self._leave()
        self.slots.release(sequence.slot)

    def _leave(self) -> None:
        """Discard what is in flight; it has moved all rows that were to be moved."""
        if self._ahead is not None and self._ahead.in_flight:
            self._ahead.leave()
            self._all_in_place()

    def _all_in_place(self) -> None:
        self._to_move = [[] for _ in range(self.slots.slots)]

    def _wanted(self, sequences: list[Sequence]) -> Wanted:
        heads = logits = hidden = False
        for sequence in sequences:
            on_graph, drafting = sequence.params.plain_argmax, sequence.drafter.heads
            heads = heads or (drafting and on_graph)
            logits = logits or not on_graph
            hidden = hidden or (drafting and not on_graph) or sequence.keep_hidden
        return Wanted(heads, logits, hidden)

    def _idle_others(self, sequences: list[Sequence], buffers: StepBuffers) -> None:
        busy = {sequence.slot for sequence in sequences}
        for slot in range(self.slots.slots):
            if slot not in busy:
                buffers.idle(slot, int(self.slots.lengths[slot]))

    def _draft(self, sequence: Sequence, buffers: StepBuffers) -> None:
        """Fill the slot's rows: the root, then what the sequence drafts below it."""
        slot, length = sequence.slot, int(self.slots.lengths[sequence.slot])
        sequence.draft = sequence.drafter.draft(sequence.candidates)
        shape = sequence.draft.shape
        rows = shape.rows
        buffers.tokens[slot, 0] = sequence.root
        buffers.tokens[slot, 1:rows] = sequence.draft.tokens
        if rows < buffers.rows:
            buffers.ancestors[slot] = False
            buffers.tokens[slot, rows:] = 0
            buffers.positions[slot, rows:] = length
        buffers.ancestors[slot, :rows, :rows] = shape.ancestors
        buffers.positions[slot, :rows] = length + shape.depths
        buffers.forced[slot] = 1
        buffers.write_index[slot] = self.margin + length

    def _accept(self, sequence: Sequence, buffers: StepBuffers, index: int) -> Acceptance:
        """Which rows survive, and what is emitted: read from the graph for plain argmax, decided on the host otherwise.

        Then the heads' candidates at the last accepted row become the sequence's.
        """
        drafting, shape = sequence.drafter.heads, sequence.draft.shape
        sequence.candidates = None
        if sequence.params.plain_argmax:
            path = shape.row_paths[int(buffers.last_row[index])] if shape.rows > 1 else ()
            emitted = [int(buffers.tokens[index, row]) for row in path] + [int(buffers.next_token[index])]
            outcome = Acceptance(path=path, tokens=emitted)
            if drafting:
                sequence.candidates = Candidates(buffers.candidates[index].copy(), buffers.log_probs[index].copy())
        else:
            tokens, logits = buffers.tokens[index], buffers.logits[index]
            outcome = accept(sequence.params, shape.parents, tokens, logits, sequence.tokens, sequence.prompt_length)
            if drafting:
                last = outcome.path[-1] if outcome.path else 0
                state, root = buffers.hidden[index, last][None], np.array([outcome.tokens[-1]], np.int64)
                tokens, log_probs = self.executor.propose(state, root)
                sequence.candidates = Candidates(tokens[0], log_probs[0])
        if sequence.keep_hidden:
            sequence.hidden.extend(buffers.hidden[index, row].copy() for row in (0, *outcome.path))
        return outcome

    def _commit(self, sequence: Sequence, outcome: Acceptance) -> list[int]:
        """Advance the slot over the root and the accepted rows; the next step moves those rows into place."""
        slot, accepted = sequence.slot, len(outcome.path)
        length = int(self.slots.lengths[slot])
        kept = sequence.emit(outcome.tokens)
        self.slots.advance(slot, min(1 + accepted, self.slots.capacity - length))
        self._to_move[slot] = [self.margin + length + row for row in outcome.path]
        sequence.stats.add_step(sequence.draft, accepted, len(kept), heads=sequence.drafter.heads)
        return kept
