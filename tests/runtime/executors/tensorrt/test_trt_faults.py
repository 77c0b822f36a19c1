"""What could be wired wrongly, wired wrongly: each fault is caught by the device or shows in the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import ROOT_ONLY, Session, load
from medusa_deploy.runtime.drafting.draft import Candidates, Draft, FixedTree
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.executors.ort import Bound, OrtExecutor
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, StepResult
from medusa_deploy.runtime.executors.tensorrt import executor as trt
from medusa_deploy.runtime.executors.tensorrt.buffers import StepLayout
from medusa_deploy.runtime.executors.tensorrt.context import Bindings, Contexts
from medusa_deploy.runtime.executors.tensorrt.cuda import Cuda
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.executors.tensorrt.memory import DeviceState, TensorBlock
from medusa_deploy.runtime.executors.tensorrt.staging import Landing, Staged
from medusa_deploy.runtime.tree import Tree
from support.fake_cuda import DeviceFaultError, FakeRuntime
from support.fake_engine import load_fake
from support.fake_trt import FakeTrt

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
NARROW = Tree.from_choices([(0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 0, 0)])
PROMPTS = ([4, 5, 6], [9] * 20, [30, 31])
LONG = 150
_OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "tree": WIDE, "ignore_eos": True}
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Outcome:
    """Tokens of the sequences of :func:`_use`, and how many drafts each step of the last one accepted."""

    tokens: tuple[list[int], ...]
    accepted: dict[int, int]


class Restless:
    """Verifies another tree now and then, so that the rows which a step carries over change between two steps that move some."""

    heads = True

    def __init__(self) -> None:
        self._trees = itertools.cycle([WIDE, WIDE, WIDE, WIDE, NARROW])
        self._tree = next(self._trees)

    @property
    def rows(self) -> int:
        return self._tree.rows

    def draft(self, candidates: Candidates | None) -> Draft:
        drafted = FixedTree(self._tree).draft(candidates)
        self._tree = next(self._trees)
        return drafted


def _use(session: Session) -> Outcome:
    """Everything that the executor does: prompts between steps, streams in turns, some of them closed early, some alone."""
    plain: dict[str, Any] = {**_OPTIONS, "tree": ROOT_ONLY}
    between = session.generate(token_ids=PROMPTS[1], **plain).token_ids[:1]
    first = session.stream(token_ids=PROMPTS[0], **{**_OPTIONS, "max_new_tokens": LONG})
    found: list[list[int]] = [[]]
    for _ in range(6):
        found[0] += next(first).token_ids
        between += session.generate(token_ids=PROMPTS[1], max_new_tokens=1).token_ids
    for prompt, options, steps in ((1, _OPTIONS, 8), (2, plain, 8), (1, _OPTIONS, 2), (1, _OPTIONS, 3)):
        beside = session.stream(token_ids=PROMPTS[prompt], **options)
        found.append([])
        for _ in range(steps):
            found[0] += next(first).token_ids
            found[-1] += next(beside).token_ids
        found[-1] += next(beside).token_ids
        beside.close()  # type: ignore[attr-defined]
    found[0] += [token for chunk in first for token in chunk.token_ids]
    found.append(session.generate(token_ids=PROMPTS[0], max_new_tokens=LONG, drafting=Restless(), ignore_eos=True).token_ids)
    alone = session.stream(token_ids=PROMPTS[0], **_OPTIONS)
    found.append([token for _ in range(4) for token in next(alone).token_ids])
    alone.close()  # type: ignore[attr-defined]
    last = session.generate(token_ids=PROMPTS[2], **_OPTIONS)
    return Outcome((between, *found, last.token_ids), last.stats.accepted)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> Outcome:
    """Of the CPU, each sequence by itself."""
    reference = load(tiny_bundle, threads=1)
    runs = [
        reference.generate(token_ids=prompt, **{**_OPTIONS, "max_new_tokens": count})
        for prompt, count in zip(PROMPTS, (LONG, 60, 60), strict=True)
    ]
    return Outcome(tuple(run.token_ids for run in runs), runs[-1].stats.accepted)


def _right(found: Outcome, expected: Outcome) -> bool:
    between, first, *closed, restless, alone, last = found.tokens
    one, two, three = expected.tokens
    complete = between == two[:1] * 7 and first == restless == one and last == three
    begun = [tokens == all_of_it[: len(tokens)] for tokens, all_of_it in zip(closed, (two, three, two, two), strict=True)]
    return complete and all(begun) and alone == one[: len(alone)] and found.accepted == expected.accepted


def _bindings(change: Callable[[dict[str, int], DeviceState, int], None], method: str = "bindings") -> Patch:
    """Changes addresses of a step on set ``current``."""
    right = getattr(DeviceState, method)

    def wrong(self: DeviceState, layout: StepLayout, current: int, *rest: int) -> Bindings:
        bindings = right(self, layout, current, *rest)
        addresses = dict(bindings.addresses)
        change(addresses, self, current)
        return Bindings(bindings.shapes, addresses)

    return lambda patch: patch.setattr(DeviceState, method, wrong)


def _carried(state: DeviceState, which: int, names: Callable[[int], list[str]]) -> dict[str, int]:
    block: TensorBlock = state.carried[which]
    return block.addresses(names(2))


def _key_without(*left_out: int) -> Patch:
    """Graphs that are told apart by less than what they depend on."""
    right = Contexts.enqueue

    def wrong(self: Contexts, profile: int, key: Any, bindings: Callable[[], Bindings]) -> None:
        short = None if key is None else tuple(part for index, part in enumerate(key) if index not in left_out)
        right(self, profile, short, bindings)

    return lambda patch: patch.setattr(Contexts, "enqueue", wrong)


def _no_moves(patch: pytest.MonkeyPatch) -> None:
    right = TrtExecutor.run

    def wrong(self: TrtExecutor, plan: StepPlan) -> StepResult:
        return right(self, replace(plan, moves=((),) * len(plan.moves)))

    patch.setattr(TrtExecutor, "run", wrong)


def _rows_of_the_wrong_step(patch: pytest.MonkeyPatch) -> None:
    right = TrtExecutor._run_step

    def wrong(self: TrtExecutor, layout: StepLayout, end: int, heads: int) -> None:
        self._current_set = 1 - self._current_set
        right(self, layout, end, heads)

    patch.setattr(TrtExecutor, "_run_step", wrong)


def _nothing_moves_after_a_prompt(patch: pytest.MonkeyPatch) -> None:
    """A prefill that uses the sets, as a step does."""
    right = TrtExecutor._prefill

    def wrong(self: TrtExecutor, rows: SlotRows, length: int) -> SlotResult | Exception:
        result = right(self, rows, length)
        self._current_set = self._current_set if length else 1 - self._current_set  # once a prompt, not once a chunk
        return result

    patch.setattr(TrtExecutor, "_prefill", wrong)


def _draft_slots_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = TrtExecutor._upload

    def wrong(self: TrtExecutor, staged: Staged, *addresses: int) -> None:
        staged.inputs.draft_slots[:] = 0
        right(self, staged, *addresses)

    patch.setattr(TrtExecutor, "_upload", wrong)


def _into_the_first_place(patch: pytest.MonkeyPatch) -> None:
    right = TrtExecutor._land

    def wrong(self: TrtExecutor, landing: Landing, *arguments: Any) -> None:
        if any(landing is place for place in self._ring):
            landing.memory = self._ring[0].memory
            landing._by_rows.clear()
        right(self, landing, *arguments)

    patch.setattr(TrtExecutor, "_land", wrong)


_FAULTS: dict[str, Patch] = {
    "swapped double buffers": _bindings(lambda at, state, current: at.update(_carried(state, current, step_io.new_names))),
    "carried rows of two steps ago": _bindings(
        lambda at, state, current: at.update(_carried(state, 1 - current, step_io.carried_names))
    ),
    "one layer's carried rows for another's": _bindings(
        lambda at, _state, _current: at.update({"carried_key.1": at["carried_key.0"]})
    ),
    "key and value swapped": _bindings(
        lambda at, _state, _current: at.update({"carried_key.1": at["carried_value.1"], "carried_value.1": at["carried_key.1"]})
    ),
    "a cache that isn't updated in place": _bindings(
        lambda at, state, _current: at.update({"present_key.0": state.prefill_new.memory.address})
    ),
    "the next tokens in this step's set": _bindings(
        lambda at, _state, _current: at.update({step_io.NEXT_TOKENS: at[step_io.TOKENS]})
    ),
    "an address in freed memory": _bindings(lambda at, _state, _current: at.update({step_io.FORCED: 1 << 20})),
    "a prefill into another slot": _bindings(
        lambda at, state, _slot: at.update(state.caches.addresses([*step_io.past_names(2)])), "prefill_bindings"
    ),
    "a prefill over carried rows": _bindings(
        lambda at, state, _slot: at.update(_carried(state, 0, step_io.new_names)),
        "prefill_bindings",
    ),
    "one graph for both sets": _key_without(4),
    "one graph for all visible lengths": _key_without(2),
    "one graph for all numbers of carried rows": _key_without(1),
    "nothing is moved": _no_moves,
    "the sets don't alternate": _rows_of_the_wrong_step,
    "a prompt turns the sets": _nothing_moves_after_a_prompt,
    "no draft slots": _draft_slots_forgotten,
    "results are read early": lambda patch: patch.setattr(Cuda, "wait", lambda self, event: None),
    "a ring of one": _into_the_first_place,
    "steps in flight are never discarded": lambda patch: patch.setattr(TrtExecutor, "_discard", lambda self: None),
}


@contextmanager
def _session(bundle: Path, *patches: Patch, hazard: bool = False, fast: bool = False) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "COLUMN_BUCKET", 32)
        for each in patches:
            each(patch)
        runtime = FakeRuntime(fast=fast)
        try:
            yield load_fake(bundle, patch, FakeTrt(runtime, hazard=hazard), slots=2, prefix_cache=False)
        finally:
            for handle in runtime.handles.values():
                handle.queue.clear()  # what a fault has left there runs when the memory is given back, and fails again


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
def test_wired_as_it_is_it_emits_what_the_cpu_emits(engine_bundle: Path, expected: Outcome, fast: bool) -> None:
    with _session(engine_bundle, fast=fast) as session:
        assert _right(_use(session), expected)


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_is_caught(engine_bundle: Path, expected: Outcome, fault: str) -> None:
    for fast in (False, True):
        with _session(engine_bundle, _FAULTS[fault], fast=fast) as session:
            try:
                found = _use(session)
            except (DeviceFaultError, AssertionError, IndexError, KeyError, StopIteration):  # answers that end too early too
                return
        if not _right(found, expected):
            return
    raise AssertionError("nobody noticed")


# -- caches that are written before they are read --------------------------------------------------------------------


def test_the_device_graph_does_not_care_when_a_cache_is_written(engine_bundle: Path, expected: Outcome) -> None:
    with _session(engine_bundle, hazard=True) as session:
        assert _right(_use(session), expected)


class HastyExecutor(OrtExecutor):
    """Writes the caches in place before the rest of the graph reads them: a call that is made twice finds them written."""

    def _call(self, bound: Bound, rows: SlotRows, length: int) -> None:
        super()._call(bound, rows, length)
        super()._call(bound, rows, length)


def test_a_graph_that_gathers_from_the_cache_it_writes_is_caught(tiny_bundle: Path, expected: Outcome) -> None:
    session = load(tiny_bundle, slots=2, variant="standard", threads=1)
    assert _right(_use(session), expected)
    executor = session.executor
    assert isinstance(executor, OrtExecutor)
    hasty = Session(session.bundle, HastyExecutor(executor.model, 1))
    assert not _right(_use(hasty), expected)


def test_without_drafts_there_is_nothing_to_move_and_the_order_is_harmless(tiny_bundle: Path) -> None:
    session = load(tiny_bundle, slots=2, variant="standard", threads=1)
    executor = session.executor
    assert isinstance(executor, OrtExecutor)
    hasty = Session(session.bundle, HastyExecutor(executor.model, 1))
    options: dict[str, Any] = {"token_ids": [4, 5, 6], "max_new_tokens": 30, "speculative": False}
    assert hasty.generate(**options).token_ids == session.generate(**options).token_ids
