"""A whole session at random: submit, tick, read, cancel, fail. What belongs to one owner stays true at every moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from medusa_deploy.runtime import Chunk, Request, SamplingParams
from medusa_deploy.runtime.errors import NumericsError, StepError
from medusa_deploy.runtime.loop.handle import Handle
from medusa_deploy.runtime.request import AUTOMATIC, Generation, Rows
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree, chain
from support.fake_executor import FakeSession, fake_session
from support.tiny import VOCAB

CAPACITY, CHUNK = 48, 8
WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
PARAMS = (SamplingParams(), SamplingParams(mode="sample", seed=3), SamplingParams(frequency_penalty=0.3))
BROKEN = VOCAB - 1
"""A token that makes NaN of all that sees it."""


@dataclass
class Asked:
    """One request: what its answer is when it is alone, and what was read of it."""

    handle: Handle
    expected: list[int]
    flag: list[bool]
    cancelled: bool = False
    failing: bool = False
    read: list[Chunk] = field(default_factory=list)
    reader: Iterator[Chunk] | None = None


class SessionMachine(RuleBasedStateMachine):
    """Drives a session over the fake executor from one thread."""

    session: FakeSession

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.others: list[SimpleNamespace] = []

    @initialize(slots=st.integers(1, 3), padded=st.booleans())
    def load(self, slots: int, padded: bool) -> None:
        self.session = fake_session(slots, capacity=CAPACITY, prefill_chunk=CHUNK, padded=padded)
        self.alone = fake_session(1, capacity=CAPACITY, prefill_chunk=CHUNK)
        self.session.executor.nan = self.alone.executor.nan = frozenset({BROKEN})

    @rule(
        length=st.one_of(st.sampled_from([1, CHUNK, CHUNK + 1, 2 * CHUNK, CAPACITY - 1]), st.integers(1, 30)),
        first=st.integers(0, VOCAB - 1),
        new=st.one_of(st.just(CAPACITY), st.integers(1, 12)),
        params=st.sampled_from(PARAMS),
        drafting=st.sampled_from([AUTOMATIC, Rows(4), Rows(6, lookup=False), WIDE, chain(2), ROOT_ONLY]),
        priority=st.integers(-1, 1),
        hidden=st.booleans(),
        late=st.sampled_from([False] * 6 + [True]),
    )
    def submit(
        self,
        length: int,
        first: int,
        new: int,
        params: SamplingParams,
        drafting: Rows | Tree,
        priority: int,
        hidden: bool,
        late: bool,
    ) -> None:
        prompt = [(first + 5 * place) % VOCAB for place in range(length)]
        new = min(new, CAPACITY - length)
        flag = [False]
        options = {"token_ids": prompt, "max_new_tokens": new, "params": params, "keep_hidden": hidden}
        ((_, alone),) = self.alone.generate_many([Request(**options, drafting=ROOT_ONLY)])  # type: ignore[arg-type]
        request = Request(
            **options, drafting=drafting, priority=priority, deadline=1e-9 if late else None, cancel=lambda: flag[0]  # type: ignore[arg-type]
        )
        failing = isinstance(alone.error, NumericsError)
        self.asked.append(Asked(self.session.submit(request), alone.token_ids, flag, late, failing))

    @precondition(lambda self: self.asked)
    @rule(times=st.integers(1, 4))
    def tick(self, times: int) -> None:
        for _ in range(times):
            self.session.loop.tick()

    @precondition(lambda self: self.asked and not self.others)
    @rule(data=st.data(), chunks=st.integers(1, 3))
    def read(self, data: st.DataObject, chunks: int) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        asked.reader = asked.reader or asked.handle.chunks()
        for _ in range(chunks):
            try:
                asked.read.append(next(asked.reader))
            except StopIteration:
                assert asked.handle.done and asked.handle.error is None
                asked.reader = None
                break
            except (StepError, NumericsError):
                assert asked.failing
                asked.reader = None
                break

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), how=st.sampled_from(["handle", "function", "close"]))
    def cancel(self, data: st.DataObject, how: str) -> None:
        asked = data.draw(st.sampled_from(self.asked))
        asked.cancelled = True
        if how == "function":
            asked.flag[0] = True
            return
        if how == "close" and asked.reader is not None:
            asked.reader.close()  # type: ignore[attr-defined]
            asked.reader = None
        asked.handle.cancel()
        assert asked.handle.done
        asked.handle.cancel()

    @rule(call=st.integers(1, 2))
    def fail(self, call: int) -> None:
        """The first call of the next step fails, which is the decoding slots', or the second one, a prompt's chunk."""
        self.session.executor.fail_at = self.session.executor.calls + call
        for asked in self.asked:
            asked.failing = asked.failing or not asked.handle.done
        self.session.loop.tick()
        self.session.executor.fail_at = None

    @precondition(lambda self: self.session.slots.free)
    @rule()
    def somebody_takes_a_slot(self) -> None:
        self.others.append(SimpleNamespace(slot=-1))
        self.session.slots.acquire(self.others[-1])

    @precondition(lambda self: self.others)
    @rule()
    def and_gives_it_back(self) -> None:
        self.session.slots.release(self.others.pop())

    @precondition(lambda self: self.asked and not self.others)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        self.check_end(data.draw(st.sampled_from(self.asked)))

    def check_end(self, asked: Asked) -> Generation:
        found = asked.handle.wait()
        count = len(found.token_ids)
        assert found.token_ids == asked.expected[:count], "the company of others changed an answer"
        match found.finish_reason:
            case "length":
                assert count == len(asked.expected) and found.error is None
            case "cancelled":
                assert asked.cancelled and found.error is None
            case "error":
                assert asked.failing and isinstance(found.error, (StepError, NumericsError))
            case reason:
                raise AssertionError(reason)
        sequence = asked.handle.sequence
        if sequence.keep_hidden and count:
            assert found.hidden is not None and len(found.hidden) == count
        stats = found.stats
        assert stats.emitted == max(count - 1, 0) and sum(stats.accepted.values()) == stats.steps
        assert sum(rows * steps for rows, steps in stats.rows_histogram.items()) == stats.rows
        return found

    @invariant()
    def slots_are_held_once_and_by_those_that_run(self) -> None:
        pool = self.session.slots
        running = [a.handle.sequence for a in self.asked if a.handle.sequence.state in ("prefill", "decode")]
        assert all(pool.holds(sequence) for sequence in running)
        assert len({holder.slot for holder in [*running, *self.others]}) == len(running) + len(self.others)
        assert pool.free + len(running) + len(self.others) == pool.slots
        assert set(self.session.loop._handles) <= {asked.handle.sequence for asked in self.asked if not asked.handle.done}

    @invariant()
    def lengths_follow_the_tokens(self) -> None:
        pool = self.session.slots
        assert ((pool.lengths >= 0) & (pool.lengths <= CAPACITY)).all()
        for asked in self.asked:
            sequence = asked.handle.sequence
            length = int(pool.lengths[sequence.slot])
            if sequence.state == "prefill":
                assert length == sequence.computed < sequence.prompt_length and sequence.emitted == []
            elif sequence.state == "decode":
                assert length == len(sequence.tokens) - 1, "the newest token is the next root"

    @invariant()
    def chunks_are_the_tokens(self) -> None:
        for asked in self.asked:
            chunks = [*asked.read, *asked.handle._chunks]
            assert [token for chunk in chunks for token in chunk.token_ids] == asked.handle.sequence.emitted

    def teardown(self) -> None:
        for other in self.others:
            self.session.slots.release(other)
        for asked in self.asked:
            self.check_end(asked)
        if self.asked:
            assert self.session.slots.free == self.session.slots.slots and not self.session.loop._handles


TestSession = SessionMachine.TestCase
TestSession.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
