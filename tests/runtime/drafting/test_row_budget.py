"""The number of rows: what it costs, what is promised, whom to believe; and that none of it changes what is emitted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from medusa_deploy.runtime import Request, SamplingParams
from medusa_deploy.runtime.drafting.row_budget import _best
from medusa_deploy.runtime.drafting.step_cost import StepCost, Track
from medusa_deploy.runtime.executors.step_plan import SlotResult, StepPlan, StepResult
from medusa_deploy.runtime.loop.sequence import Sequence
from support.fake_executor import FakeSession, fake_session
from support.simulated import PackedSimulation, Simulation, heads
from support.tiny import VOCAB

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16)


def staircase(rows: int) -> float:
    """Tiles of 6 rows, and a size that costs less than the one before it."""
    return {8: 1.6, 12: 1.45}.get(rows, 1.0 + 0.3 * ((rows - 1) // 6) + 0.01 * (rows - 1))


def observed(steps: list[tuple[int, bool]], noise: float = 0.0, load: Any = lambda step: 1.0, seed: int = 0) -> StepCost:
    cost, track, rng = StepCost(SIZES), Track(), np.random.default_rng(seed)
    for step, (rows, with_heads) in enumerate(steps):
        seconds = (staircase(rows) + 0.08 * with_heads) * load(step) * math.exp(noise * rng.normal())
        cost.observe(rows, with_heads, 0.03 * seconds, track)
    return cost


def mixed(count: int, seed: int = 1) -> list[tuple[int, bool]]:
    rng = np.random.default_rng(seed)
    return [(int(rows), bool(rows > 1 or rng.random() < 0.5)) for rows in rng.choice(SIZES, count)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_costs_come_to_be_known_whatever_their_form(noise: float) -> None:
    cost = observed(mixed(3000), noise)
    assert cost.heads == pytest.approx(0.08, abs=0.03)
    for rows in SIZES:
        assert cost.of(rows, False) == pytest.approx(staircase(rows), rel=0.06)
    assert cost.of(12, True) < cost.of(8, True)


def test_a_busy_machine_and_a_growing_context_move_no_cost() -> None:
    calm, busy = observed(mixed(2000)), observed(mixed(2000), load=lambda step: (1 + step / 500) * (3 if step % 400 > 200 else 1))
    assert busy.curve == pytest.approx(calm.curve, rel=0.08)


def test_interrupted_steps_move_costs_little() -> None:
    rng = np.random.default_rng(3)
    cost = observed(mixed(3000), load=lambda step: 20.0 if rng.random() < 0.03 else 1.0)
    assert cost.curve == pytest.approx([staircase(rows) for rows in SIZES], rel=0.12)


def test_one_size_alone_says_nothing_about_its_cost() -> None:
    cost = observed([(5, True)] * 50, load=lambda step: 1 + step)
    assert cost.curve == StepCost(SIZES).curve


def test_few_steps_are_spent_on_measuring() -> None:
    cost, track, spent = StepCost(SIZES), Track(), []
    while (kind := cost.to_measure(track)) is not None:
        spent.append(kind)
        cost.observe(*kind, 0.01, track)
    assert len(spent) == 12
    assert max(rows for rows, _ in spent) == 8


@given(
    chances=st.lists(st.floats(0, 1), max_size=20),
    pace=st.floats(1, 4),
    costs=st.lists(st.floats(0.5, 3), min_size=8, max_size=8),
)
def test_the_size_chosen_is_the_best_of_all(chances: list[float], pace: float, costs: list[float]) -> None:
    gains = list(itertools.accumulate(sorted(chances, reverse=True), initial=0.0))
    cost = StepCost(SIZES)
    cost.curve = (1.0, *costs)
    rows, value = _best(gains, pace, cost)
    values = {n: sum(sorted(chances, reverse=True)[: n - 1]) - pace * (t - 1) for n, t in zip(SIZES, cost.curve, strict=True)}
    assert value == pytest.approx(max(values.values()))
    assert values[rows] == pytest.approx(value)


# -- whom to believe, in simulated time ----------------------------------------------------------------------------


@pytest.mark.parametrize("says", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("measured", [False, True])
def test_heads_that_are_always_wrong_cost_next_to_nothing(says: float, measured: bool) -> None:
    simulation = Simulation(staircase, measured=measured)
    first, *others = [simulation.run(heads(says, right=0.0)) for _ in range(4)]
    assert first > 0.93, "the first request pays for finding out"
    assert min(others) > 0.985
    stats = simulation.sequence.stats
    assert stats.plain_steps > 0.9 * stats.steps
    assert 0 < stats.probes < 6


@pytest.mark.parametrize("seed", range(3))
def test_good_heads_are_used_nearly_as_well_as_costs_known_beforehand_allow(seed: int) -> None:
    simulation = Simulation(staircase, measured=True, seed=seed)
    speedups = [simulation.run(heads(0.6, right=0.6), 256) for _ in range(4)]
    # A chain of 4 below the root: Σ 0.6^d accepted, in a step that costs staircase(5) + 0.05.
    ideal = sum(0.6**depth for depth in range(5)) / (staircase(5) + 0.05)
    assert np.mean(speedups[1:]) > 0.9 * ideal
    assert simulation.sequence.stats.trust is not None
    assert simulation.sequence.stats.trust[0] == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("sure", [0.6, 0.999])
def test_costs_are_those_of_the_rows_that_ran(sure: float) -> None:
    """Where few candidates are likely, a step that was to measure 8 rows ran fewer, and 8 looked cheap."""
    simulation = Simulation(staircase, noise=0.0)
    for _ in range(2):
        simulation.run(heads(sure, right=0.5))
    costs = simulation.sequence.stats.costs
    assert costs is not None
    assert [costs[str(rows)] for rows in (4, 8)] == pytest.approx([staircase(rows) for rows in (4, 8)], rel=0.1)


def test_it_comes_back_when_heads_become_good() -> None:
    simulation = Simulation(staircase)
    for _ in range(4):
        simulation.run(heads(0.9, right=0.0))
    assert simulation.sequence.stats.plain_steps > 110
    speedups = [simulation.run(heads(0.9, right=0.8)) for _ in range(8)]
    assert speedups[-1] > 1.8


def test_rows_that_cost_more_than_they_bring_are_not_taken() -> None:
    simulation = Simulation(float)
    speedups = [simulation.run(heads(0.5, right=0.5)) for _ in range(4)]
    assert min(speedups[1:]) > 0.95
    assert simulation.sequence.stats.rows_histogram == {1: 128}


# -- rows of several sequences -------------------------------------------------------------------------------------


def packed_cost(rows: int) -> float:
    """A step whose weights cost 1 and each row 0.06."""
    return 1 + 0.06 * rows


@pytest.mark.parametrize("count", [2, 4, 8])
def test_useless_heads_make_shared_steps_hardly_slower(count: int) -> None:
    simulation = PackedSimulation(packed_cost)
    first, *others = [simulation.run([heads(0.9, right=0.0)] * count) for _ in range(3)]
    assert first > 0.9, "the first ones pay for finding out"
    assert min(others) > 0.975


def test_rows_go_to_the_sequences_that_make_most_of_them() -> None:
    simulation = PackedSimulation(packed_cost)
    for _ in range(2):
        speedup = simulation.run([heads(0.8, right=0.8), heads(0.8, right=0.8), heads(0.05, right=0.05), heads(0.05, right=0.05)])
    of_four = np.array([rows for rows in simulation.rows if len(rows) == 4])
    assert of_four[:, :2].mean() > of_four[:, 2:].mean() + 1.5
    assert speedup > 1.1


def test_a_request_that_is_late_gets_rows_first() -> None:
    """Two equal sequences; the budget lets rows pay that a deadline needs and that probability alone would not take."""
    simulation = PackedSimulation(lambda rows: 1 + 0.5 * rows)
    simulation.run([heads(0.3, right=0.3)] * 2)
    budget = simulation.row_budget
    budget.clock = lambda: 100.0
    sequences = []
    for deadline in (None, 100.5):
        sequence = Sequence([0], 0, SamplingParams(), 200, frozenset(), budget.drafter(None, on_host=False), deadline=deadline)
        sequence.candidates = heads(0.3, right=0.3)(simulation.rng, [1, 2, 3, 4])
        sequences.append(sequence)
    for _ in range(40):
        budget.choose(sequences)
        if sum(sequence.drafter.rows for sequence in sequences) > 2:
            break
        for sequence in sequences:
            sequence.draft = sequence.drafter.draft(sequence.candidates)
        budget.learn(sequences, [[1], [1]], [0.06, 0.06])
    easy, late = (sequence.drafter.rows for sequence in sequences)
    assert late > easy


# -- what is emitted -----------------------------------------------------------------------------------------------


def simulated_times(session: FakeSession, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Step times at random: any size may look like the best one."""
    rng, run = np.random.default_rng(seed), session.executor.run

    def timed(plan: StepPlan) -> StepResult:
        result = run(plan)
        for found in result.slots:
            assert isinstance(found, SlotResult)
            found.seconds = float(rng.exponential())
            session.executor.engine_seconds += found.seconds
        return result

    monkeypatch.setattr(session.executor, "run", timed)


@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    count=st.integers(1, 120),
    seed=st.integers(0, 99),
    lookup=st.booleans(),
)
def test_whatever_is_chosen_the_text_is_plain_greedys(prompt: list[int], count: int, seed: int, lookup: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        session = fake_session(seed=seed % 3)
        simulated_times(session, patch, seed)
        for tokens in (prompt, prompt[::-1]):
            generation = session.generate(token_ids=tokens, max_new_tokens=count, lookup=lookup)
            assert generation.token_ids == session.language.greedy(tokens, count)
            stats = generation.stats
            assert sum(stats.rows_histogram.values()) == stats.steps
            assert sum(rows * steps for rows, steps in stats.rows_histogram.items()) == stats.rows
            assert max(stats.rows_histogram, default=0) <= session.max_rows


def test_several_slots_and_modes_share_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    session, alone = fake_session(3), fake_session()
    simulated_times(session, monkeypatch, 5)
    sampled = SamplingParams(mode="sample", temperature=0.3, seed=2)
    requests = [
        Request(token_ids=[token] * 9, max_new_tokens=20 + token, params=sampled if token % 3 == 0 else SamplingParams(),
                rows=7 if token % 4 == 1 else None)
        for token in range(1, 9)
    ]  # fmt: skip
    found = dict(session.generate_many(requests))
    for index, request in enumerate(requests):
        expected = alone.generate(
            token_ids=request.token_ids, max_new_tokens=request.max_new_tokens, params=request.params, speculative=False
        )
        assert found[index].token_ids == expected.token_ids
    assert session.slots.free == 3


@pytest.mark.parametrize("padded", [False, True])
def test_costs_are_learnt_although_a_chunk_of_a_prompt_comes_into_every_gap(padded: bool) -> None:
    """Chunks take some ten times a step's time, at random. What is learnt is what is learnt without them."""
    alone, disturbed = learnt_costs(padded, chunks=False), learnt_costs(padded, chunks=True)
    assert disturbed == alone
    guess = {**StepCost(tuple(int(rows) for rows in alone if rows != "heads")).shown()}
    assert sum(alone[rows] != guess[rows] for rows in alone) > 2


def learnt_costs(padded: bool, *, chunks: bool) -> dict[str, float]:
    """Costs after an answer of 200 tokens, beside prompts of 160 tokens or alone."""
    session = fake_session(2, prefill_chunk=4, padded=padded)
    run, rng = session.executor.run, np.random.default_rng(0)

    def timed(plan: StepPlan) -> StepResult:
        result = run(plan)
        for rows, found in zip(plan.active, result.slots, strict=True):
            assert isinstance(found, SlotResult)
            step = staircase(rows.count) + 0.08 * rows.wanted.heads
            found.seconds = float(rng.exponential(0.3)) if rows.forced > 1 else 0.03 * step
            session.executor.engine_seconds += found.seconds
        return result

    session.executor.run = timed  # type: ignore[method-assign]
    answer = session.submit(Request(token_ids=[1, 2, 3], max_new_tokens=200))
    while not answer.done:
        prompt = rng.integers(0, VOCAB, 160).tolist()  # another one each time: none is cached
        others = session.submit(Request(token_ids=prompt, max_new_tokens=1)) if chunks else answer
        while not (answer.done or others.done):
            assert session.loop.tick()
    gaps = [any(rows.forced > 1 for rows in plan.active) for plan in session.executor.plans[1:]]
    assert sum(gaps) > 0.9 * len(gaps) if chunks else not any(gaps)
    costs = answer.wait().stats.costs
    assert costs is not None
    return costs


def test_the_last_token_asked_for_takes_a_plain_step() -> None:
    stats = fake_session().generate(token_ids=[1, 2], max_new_tokens=2).stats
    assert (stats.steps, stats.rows, stats.plain_steps) == (1, 1, 1)
