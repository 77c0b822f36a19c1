"""The loop: one step of every request under way. Whatever generates, streams, trains or measures answers is a face of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import cast

import numpy as np

from ..drafting.draft import NOTHING, Candidates
from ..drafting.row_budget import RowBudget
from ..errors import StepError
from ..executors.executor import CopyingExecutor, Executor
from ..executors.step_plan import SlotResult, SlotRows, StepResult, rows_to_move
from .acceptance import Acceptance, token_logprob
from .handle import Handle
from .planning import step_plan
from .scheduler import Scheduler, Turn
from .sequence import Sequence
from .slots import SlotPool
from .verify import named, verify


class Loop:
    """Drives requests through an executor, one thread at a time (:mod:`.driver`); only :meth:`submit` is open to all threads.

    Invariants of a step, for each sequence: emitted = 1 + accepted; 0 ≤ accepted ≤ depth of its tree; the slot's length grows by
    1 + accepted; where its part of the step failed, the length has not moved.
    """

    def __init__(self, executor: Executor, slots: SlotPool, row_budget: RowBudget, prefill_chunk: int) -> None:
        self.executor, self.slots, self.row_budget = executor, slots, row_budget
        self.scheduler = Scheduler(prefill_chunk)
        self.clock: Callable[[], float] = time.perf_counter
        self.stepped: float | None = None  # when the newest step ended, by the monotonic clock
        self._submitted: deque[Handle] = deque()  # the mailbox
        self._handles: dict[Sequence, Handle] = {}  # of all sequences that wait or run, in order of arrival

    def submit(self, handle: Handle) -> None:
        """Queue a request."""
        self._submitted.append(handle)

    def tick(self) -> bool:
        """Advance every request by one step. Returns whether there was anything to do.

        A step is one plan for the executor: the rows of all decoding sequences, and one chunk of one prompt.
        """
        began = self.clock()
        self.retire()
        self.admit()
        taking_part = self.scheduler.turns(self._handles)
        if not taking_part:
            return False
        try:
            turns = self._draft(taking_part)
            if not turns:
                return True
            plan = step_plan(turns, self.slots, ahead=self.executor.abilities.ahead)
            engine = self.executor.engine_seconds
            result = self.executor.run(plan)
            engine = self.executor.engine_seconds - engine
            outcomes = verify(turns, plan, result)
            self._commit(turns, plan.active, result, outcomes)
            self._learn(turns, result, outcomes, engine, self.clock() - began)
            self._deliver(turns)
        except Exception as error:  # noqa: BLE001 - it is raised by the handles of those that it ends
            self._abandon(taking_part, error)
        except BaseException:
            self._abandon(taking_part)
            raise
        self.stepped = time.monotonic()
        return True

    # -- who takes part --------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Take in submitted requests; end those that are cancelled or late."""
        while self._submitted:
            handle = self._submitted[0]  # it leaves the mailbox last: an interrupt may come between any two calls
            self._handles[handle.sequence] = handle
            self._submitted.popleft()
        for sequence in list(self._handles):
            try:
                if not sequence.done and sequence.asks_to_end():
                    sequence.finish_reason = "cancelled"
            except Exception as error:  # noqa: BLE001 - the caller's own function failed
                sequence.fail(error)
            if sequence.done:
                self._end(sequence)

    def admit(self) -> None:
        """Give free slots to waiting sequences, with the beginning of their prompts where a free slot holds it."""
        while self.slots.free and (sequence := self.scheduler.next_waiting(self._handles)) is not None:
            place = self.slots.place(sequence.tokens, sequence.salt)
            if place.source != place.slot:
                self.slots.forget(place.slot)
                try:
                    cast(CopyingExecutor, self.executor).copy(place.source, place.slot, place.rows)
                except Exception as error:  # noqa: BLE001 - the engine's; the next call ends the sequence
                    sequence.fail(named(error))
                    continue
            # A waiting sequence may say that rows are computed: whoever admits it says so anew.
            sequence.stats.queue_seconds = time.monotonic() - sequence.since
            sequence.computed = sequence.stats.prompt_tokens = sequence.stats.cached_tokens = place.rows
            self.slots.acquire(sequence, place)
            self.slots.prefix_stats.add(sequence.prompt_length, place.rows)

    # -- the parts of a step ---------------------------------------------------------------------------------------

    def _draft(self, turns: list[Turn]) -> list[Turn]:
        """Choose the rows of every decoding sequence. Returns the turns without those whose drafter failed."""
        self.row_budget.choose([turn.sequence for turn in turns if not turn.prompt_rows])
        for turn in turns:
            sequence = turn.sequence
            try:
                sequence.draft = NOTHING if turn.prompt_rows else sequence.drafter.draft(sequence.candidates)
            except Exception as error:  # noqa: BLE001 - a drafter may be the caller's own
                sequence.fail(error)
                self._end(sequence)
        return [turn for turn in turns if not turn.sequence.done]

    def _commit(
        self, turns: list[Turn], rows: tuple[SlotRows, ...], result: StepResult, outcomes: list[Acceptance | Exception]
    ) -> None:
        """Advance slots and sequences by what was accepted; sequences whose part failed end with their error."""
        self.slots.moved()
        for turn, planned, found, outcome in zip(turns, rows, result.slots, outcomes, strict=True):
            if isinstance(outcome, Exception):
                turn.sequence.fail(outcome)
            else:
                assert isinstance(found, SlotResult)
                self._advance(turn, outcome)
                if outcome.tokens:
                    _keep(turn.sequence, planned, found, outcome)
                    _keep_logprobs(turn.sequence, found, outcome)
        self._propose([turn.sequence for turn in turns if turn.sequence.accepted_state is not None])

    def _advance(self, turn: Turn, outcome: Acceptance) -> None:
        sequence, slot, accepted = turn.sequence, turn.sequence.slot, len(outcome.path)
        if turn.prompt_rows:
            sequence.computed += turn.prompt_rows
            self.slots.advance(slot, turn.prompt_rows)
            sequence.stats.prompt_tokens = sequence.computed
            sequence.emit(outcome.tokens)
            return
        length = int(self.slots.lengths[slot])
        path = outcome.path[: self.slots.capacity - length - 1]  # a slot that is full is at its end
        self.slots.advance(slot, 1 + len(path), rows_to_move(length, path))
        kept = len(sequence.emit(outcome.tokens))
        draft, drafter = sequence.draft, sequence.drafter
        sequence.stats.add_step(draft.shape.rows, accepted, kept, heads=drafter.heads, looked_up=draft.looked_up)

    def _propose(self, sequences: list[Sequence]) -> None:
        """Run the heads for sequences whose rows the host accepted."""
        states = [sequence.accepted_state for sequence in sequences]
        for sequence in sequences:
            sequence.accepted_state = None
        going_on = [(s, state) for s, state in zip(sequences, states, strict=True) if state is not None and not s.done]
        if going_on:
            roots = np.array([sequence.root for sequence, _ in going_on], np.int64)
            try:
                tokens, log_probs = self.executor.propose(np.stack([state for _, state in going_on]), roots)
            except Exception as error:  # noqa: BLE001 - the engine's; it ends those that asked
                for sequence, _ in going_on:
                    sequence.fail(named(error))
                return
            for (sequence, _), *proposed in zip(going_on, tokens, log_probs, strict=True):
                sequence.candidates = Candidates(*proposed)

    def _learn(
        self, turns: list[Turn], result: StepResult, outcomes: list[Acceptance | Exception], engine: float, seconds: float
    ) -> None:
        """Learn from the step: statistics, and the costs of rows by each call's own time with its share of the host's.

        Where a chunk of a prompt was in the same call, its time says nothing about rows.
        """
        packed = self.executor.abilities.packed
        host = (seconds - engine) / (1 if packed else len(turns))
        mixed = packed and any(turn.prompt_rows for turn in turns)
        learnt: list[tuple[Sequence, list[int], float]] = []
        for turn, found, outcome in zip(turns, result.slots, outcomes, strict=True):
            stats = turn.sequence.stats
            if turn.prompt_rows:
                stats.prefill_seconds += seconds
                continue
            stats.decode_seconds += seconds
            stats.engine_seconds += engine
            if isinstance(found, SlotResult) and isinstance(outcome, Acceptance):
                learnt.append((turn.sequence, outcome.tokens, 0.0 if mixed else found.seconds + host))
        if learnt:
            self.row_budget.learn(*zip(*learnt, strict=True))

    def _deliver(self, turns: list[Turn]) -> None:
        """Hand the emitted tokens to their handles; sequences that ended give their slots back."""
        for sequence in [turn.sequence for turn in turns]:
            self._handles[sequence].put()
            if sequence.done:
                self._end(sequence)

    def _abandon(self, turns: list[Turn], error: Exception | None = None) -> None:
        """End all sequences of a step that broke off, by an interrupt where there is no error: nobody knows how far it came."""
        for sequence in [turn.sequence for turn in turns if turn.sequence in self._handles]:
            if sequence.error is None and not self._handles[sequence].done:
                sequence.fail(error or StepError("the step was interrupted", hint="send the request again"))
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Give the sequence's slot back and close its handle. What an interrupt leaves undone, the next call does."""
        if self.slots.holds(sequence):  # nobody knows what a step that failed has written
            self.slots.release(sequence, sequence.tokens if sequence.error is None else (), sequence.salt)
        self._handles[sequence].end()
        del self._handles[sequence]


def _keep(sequence: Sequence, rows: SlotRows, found: SlotResult, outcome: Acceptance) -> None:
    """Keep what the next step drafts from, and the hidden states that were asked for. The executor's arrays are reused."""
    sequence.candidates = None
    if found.candidates is not None and found.log_probs is not None:
        sequence.candidates = Candidates(found.candidates.copy(), found.log_probs.copy())
    if found.hidden is not None:
        path = (0, *outcome.path)
        if rows.wanted.logits and sequence.drafter.heads:
            sequence.accepted_state = found.hidden[path[-1]].copy()
        if sequence.keep_hidden:
            sequence.hidden.extend(found.hidden[row].copy() for row in path)


def _keep_logprobs(sequence: Sequence, found: SlotResult, outcome: Acceptance) -> None:
    """Keep the log-probabilities of the step's emitted tokens, each from the row before it."""
    if sequence.top_logprobs is None or found.logits is None:
        return
    kept = sequence.logprobs = [] if sequence.logprobs is None else sequence.logprobs
    added = len(sequence.tokens) - sequence.prompt_length - len(kept)
    for row, token in zip((0, *outcome.path)[:added], outcome.tokens[:added], strict=True):
        kept.append(token_logprob(found.logits[row], token, sequence.top_logprobs))
