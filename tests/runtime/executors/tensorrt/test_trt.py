"""The executor on a device that is as slow and as strict as one may be: results, buffers, graphs, and what a step costs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, SamplingParams, Session, load
from medusa_deploy.runtime.drafting.draft import FixedTree
from medusa_deploy.runtime.errors import CapacityError, UsageError
from medusa_deploy.runtime.executors.step_plan import NO_OUTPUTS, SlotResult, SlotRows, Wanted
from medusa_deploy.runtime.executors.tensorrt import executor as trt, staging
from medusa_deploy.runtime.executors.tensorrt.context import Contexts
from medusa_deploy.runtime.executors.tensorrt.cuda import Cuda
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.tree import Shape, Tree, chain
from support.fake_engine import add_fake_engine, load_fake
from support.fake_trt import FakeTrt, FakeTrtRtx
from support.plan_driver import HEADS_WANTED, Caller, chunk, succeeded
from support.tiny import HEADS, VOCAB

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
Load = Callable[..., Session]


def _executor(session: Session) -> TrtExecutor:
    assert isinstance(session.executor, TrtExecutor)
    return session.executor


def _steps(session: Session, count: int, **options: Any) -> Iterator[None]:
    """Steps of one generation, one by one."""
    stream = session.stream(token_ids=[3, 4, 5], max_new_tokens=200, ignore_eos=True, **options)
    for _ in range(count):
        next(stream)
        yield
    stream.close()  # type: ignore[attr-defined]


def test_it_is_an_executor_that_runs_ahead(on_gpu: Load, tiny_session: Session) -> None:
    abilities = on_gpu(slots=2).executor.abilities
    assert abilities.ahead and abilities.padded
    assert (abilities.slots, abilities.deepest, abilities.step_rows) == (2, HEADS, (1, 4, 8, 16))
    assert not tiny_session.executor.abilities.ahead


def test_both_packages_decode_as_the_cpu_does(
    engine_bundle: Path, either_gpu: FakeTrt, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load_fake(engine_bundle, monkeypatch, either_gpu)
    for prompt in ([1, 2, 3], [5] * 40):
        options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": 50, "ignore_eos": True}
        plain = tiny_session.generate(speculative=False, **options).token_ids
        assert session.generate(**options).token_ids == plain
        assert session.generate(speculative=False, **options).token_ids == plain
    if isinstance(either_gpu, FakeTrtRtx):
        config = either_gpu.engines[0].configs[0]
        assert config.cuda_graph_strategy is either_gpu.CudaGraphStrategy.DISABLED and config.cache is not None


def test_a_second_turn_starts_from_the_rows_of_the_first(on_gpu: Load, tiny_session: Session) -> None:
    session = on_gpu(slots=2)
    for first in (3, 50):  # the second conversation begins beside the first one's rows
        turn = [first + place % 40 for place in range(45)]
        for options in ({}, {"tree": WIDE}, {"params": SamplingParams(mode="sample", seed=3)}):
            asked: dict[str, Any] = {"max_new_tokens": 14, "ignore_eos": True, **options}
            expected = tiny_session.generate(token_ids=turn, **asked, cache_salt=str(asked)).token_ids
            other = session.stream(token_ids=[9, 8, 7], max_new_tokens=30, ignore_eos=True)
            next(other)
            found = session.generate(token_ids=turn, **asked)
            other.close()  # type: ignore[attr-defined]
            assert found.token_ids == expected
            assert (found.stats.cached_tokens > 40) == (len(turn) > 45)
            turn = [*turn, *expected, 1]


def test_sampling_on_the_host_draws_the_cpus_tokens(on_gpu: Load, tiny_session: Session) -> None:
    session = on_gpu()
    for params in (SamplingParams(mode="sample", temperature=0.8, seed=5), SamplingParams(presence_penalty=0.4)):
        for tree in (ROOT_ONLY, WIDE):
            options: dict[str, Any] = {"token_ids": [7, 8, 9], "max_new_tokens": 40, "params": params, "tree": tree}
            found, expected = session.generate(**options), tiny_session.generate(**options)
            assert found.token_ids == expected.token_ids
            assert found.stats.accepted == expected.stats.accepted


def test_hidden_states_are_the_cpus(on_gpu: Load, tiny_session: Session) -> None:
    options: dict[str, Any] = {"token_ids": [7, 8, 9], "max_new_tokens": 20, "keep_hidden": True, "tree": WIDE}
    found, expected = on_gpu().generate(**options), tiny_session.generate(**options)
    assert found.hidden is not None and expected.hidden is not None
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=1e-4)


def test_rows_chosen_by_the_host_are_verified_too(on_gpu: Load, tiny_session: Session) -> None:
    options: dict[str, Any] = {"token_ids": [1, 2, 3, 1, 2, 3], "max_new_tokens": 60, "ignore_eos": True}
    found = on_gpu().generate(rows=6, lookup=True, **options)
    assert found.token_ids == tiny_session.generate(speculative=False, **options).token_ids
    assert found.stats.lookup_steps > 0


# -- what a step costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tree": WIDE}, {"speculative": False}, {"rows": 5}], ids=["tree", "plain", "host"])
def test_in_the_steady_state_nothing_is_allocated_and_only_results_are_waited_for(
    on_gpu: Load, gpu: FakeTrt, options: dict[str, Any]
) -> None:
    session = on_gpu()
    steps = _steps(session, 60, **options)
    for _ in range(20):
        next(steps)
    before, allocations, blocked = gpu.cuda.calls.copy(), gpu.cuda.allocations, gpu.cuda.synchronisations
    graphs = len(_executor(session).contexts.graphs)
    for _ in range(30):
        next(steps)
    spent = gpu.cuda.calls - before
    assert gpu.cuda.allocations == allocations
    assert gpu.cuda.synchronisations - blocked == spent["cudaEventSynchronize"] == 30
    assert spent["cudaGraphLaunch"] == 30 and len(_executor(session).contexts.graphs) == graphs, "every step is replayed"
    assert spent["copy DeviceToHost"] == 30, "one copy brings all results"
    assert spent["copy HostToDevice"] == (60 if "rows" in options else 0)


def test_the_next_step_is_under_way_before_a_result_is_read(on_gpu: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = on_gpu()
    order: list[str] = []
    for kind, name in ((Contexts, "enqueue"), (Cuda, "wait")):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, name=name, method=method: (order.append(name), method(*args))[1])
    for _ in _steps(session, 12, tree=WIDE):
        pass
    prompt, first, following = ["enqueue", "wait"], ["enqueue", "enqueue", "wait"], ["enqueue", "wait"]
    assert order == [*prompt, *first, *following * 10], "the first step was launched by the host"


def test_results_that_are_not_wanted_stay_on_the_device(on_gpu: Load, gpu: FakeTrt) -> None:
    executor = on_gpu().executor
    before = gpu.cuda.calls.copy()
    for wanted, copies in ((NO_OUTPUTS, 1), (HEADS_WANTED, 2), (Wanted(logits=True, hidden=True), 2 + 3)):
        caller = Caller(executor)
        plan = caller.plan([chunk(0, [1, 2], wanted)])
        (found,) = succeeded(executor.run(plan))
        assert (gpu.cuda.calls - before)["copy DeviceToHost"] == copies
        delivered = [getattr(found, name) is not None for name in ("candidates", "logits", "hidden")]
        assert delivered == list(wanted)


def test_slots_that_want_logits_get_their_own_rows_and_no_others(on_gpu: Load, gpu: FakeTrt) -> None:
    caller = Caller(on_gpu(slots=3).executor)
    for slot in range(3):
        caller.prompt(slot, [slot + 3, 5, 6])
    before = gpu.cuda.calls.copy()
    rows = [caller.verifies(slot, WIDE, Wanted(heads=True, logits=slot == 1)) for slot in range(3)]
    found = succeeded(caller.executor.run(caller.plan(rows)))
    assert (gpu.cuda.calls - before)["copy DeviceToHost"] == 1 + 1
    assert [each.logits is None for each in found] == [True, False, True]
    assert found[1].logits is not None and found[1].logits.shape == (WIDE.rows, VOCAB)
    assert int(found[1].logits[found[1].last_row].argmax()) == found[1].next_token


def test_logits_of_all_sizes_share_one_block(on_gpu: Load, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a larger plan took stays up to the limit; more than that is given back in the next run."""
    caller = Caller(on_gpu(slots=3).executor)
    for slot in range(3):
        caller.prompt(slot, [slot + 3, 5, 6])
    without = set(gpu.cuda.pinned)

    def kept(*trees: Tree, wanted: Wanted = Wanted(heads=True, logits=True)) -> list[int]:  # noqa: B008 - a constant
        caller.step(*(caller.verifies(slot, tree, wanted) for slot, tree in enumerate(trees)))
        return [len(block) for address, block in gpu.cuda.pinned.items() if address not in without]

    row = VOCAB * 4
    assert kept(ROOT_ONLY) == [row]
    assert kept(WIDE, WIDE, chain(3)) == kept(ROOT_ONLY) == kept(chain(2), WIDE) == [32 * row]
    allocations = gpu.cuda.allocations
    kept(WIDE, WIDE, WIDE, wanted=HEADS_WANTED)
    kept(WIDE, WIDE)
    assert gpu.cuda.allocations == allocations, "in the steady state nothing is allocated"
    monkeypatch.setattr(staging, "KEPT_BYTES", 20 * row)
    assert kept(WIDE, WIDE) == [26 * row], "the 32 rows that were kept are too many now, and so are these"
    assert kept(WIDE, wanted=HEADS_WANTED) == []
    assert kept(WIDE) == [16 * row]


def test_there_is_a_graph_for_each_size_and_set(on_gpu: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "COLUMN_BUCKET", 64)
    session = on_gpu()
    for _ in range(2):
        session.generate(token_ids=[3, 4, 5], max_new_tokens=100, tree=WIDE, ignore_eos=True)
    keys: set[Any] = set(_executor(session).contexts.graphs)
    assert {(16, 16, visible, 1, now) for visible in (64, 128) for now in (0, 1)} <= keys
    assert {key[2] for key in keys} == {64, 128}


def test_engine_time_is_the_devices(on_gpu: Load) -> None:
    session = on_gpu()
    stats = session.generate(token_ids=[3, 4, 5], max_new_tokens=30, tree=WIDE).stats
    assert 0 < stats.engine_seconds < stats.decode_seconds


def test_where_capturing_fails_it_says_so_and_goes_on(on_gpu: Load, gpu: FakeTrt, tiny_session: Session) -> None:
    gpu.cuda.capture_fails = True
    session = on_gpu()
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: cudaStreamEndCapture failed"):
        found = session.generate(token_ids=[1, 2, 3], max_new_tokens=30, tree=WIDE).token_ids
    assert found == tiny_session.generate(token_ids=[1, 2, 3], max_new_tokens=30, tree=WIDE).token_ids
    assert not _executor(session).contexts.graphs and gpu.cuda.calls["cudaGraphLaunch"] == 0


def test_a_session_that_is_gone_gives_its_memory_back(on_gpu: Load, gpu: FakeTrt) -> None:
    session = on_gpu()
    session.generate(token_ids=[1, 2, 3], max_new_tokens=5)
    assert gpu.cuda.device and gpu.cuda.pinned
    del session
    gc.collect()
    assert not gpu.cuda.device and not gpu.cuda.pinned


# -- sizes ---------------------------------------------------------------------------------------------------------


def _drafted(slot: int, rows: int) -> SlotRows:
    """So many rows, all below the root."""
    return SlotRows(slot, np.arange(3, 3 + rows), Shape.of((-1, *[0] * (rows - 1))))


def test_a_step_takes_the_next_larger_profile(on_gpu: Load, gpu: FakeTrt) -> None:
    session = on_gpu()
    caller = Caller(session.executor)
    caller.prompt(0, [1, 2, 3])
    sizes = {}
    for rows in (1, 2, 4, 5, 8, 13):
        caller.step(_drafted(0, rows))
        sizes[rows] = gpu.enqueued[-1]["tokens"]
    assert sizes == {1: (1, 1), 2: (1, 4), 4: (1, 4), 5: (1, 8), 8: (1, 8), 13: (1, 16)}
    del gpu.enqueued[:]
    for _ in _steps(session, 3, tree=chain(2)):
        pass
    assert {shapes["tokens"] for shapes in gpu.enqueued[1:]} == {(1, 4)}


def test_more_rows_than_the_engine_takes_are_refused(bundle_copy: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load_fake(add_fake_engine(bundle_copy, rows=(1, 4)), monkeypatch, gpu)
    with pytest.raises(CapacityError, match="a step of 13 rows, the engine takes 4"):
        session.generate(token_ids=[1], max_new_tokens=5, tree=WIDE)
    caller = Caller(session.executor)
    caller.prompt(0, [1, 2, 3])
    with pytest.raises(UsageError, match="a step of 5 rows, the engine takes up to 4") as caught:
        caller.step(_drafted(0, 5))
    assert "--rows 1,4,5" in caught.value.hint
    assert session.slots.free == 1


@pytest.mark.parametrize("tree", [ROOT_ONLY, chain(3), WIDE], ids=["plain", "chain", "wide"])
def test_a_slot_can_be_filled_to_its_last_token(
    on_gpu: Load, tiny_bundle: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows past a cache's end would be written over valid ones: the fake's ONNX Runtime refuses them."""
    monkeypatch.setattr(trt, "COLUMN_BUCKET", 64)
    session, cpu = on_gpu(), load(tiny_bundle, variant="standard", threads=1)
    for length in (254, 240):
        options: dict[str, Any] = {"token_ids": [9] * length, "max_new_tokens": 256 - length, "ignore_eos": True}
        assert session.generate(tree=tree, **options).token_ids == cpu.generate(speculative=False, **options).token_ids


def test_rows_past_the_end_of_a_cache_are_never_asked_for(on_gpu: Load, gpu: FakeTrt) -> None:
    executor = on_gpu(slots=2).executor
    caller = Caller(executor)
    for slot in range(2):
        caller.prompt(slot, [1, 2, 3])
    most = executor.layout.rows - HEADS - 16 - HEADS  # rows before a step of 16, behind which the graph writes K more
    calls = len(gpu.enqueued)
    for caller.lengths in ([most + 1, 3], [3, most + 1]):
        found = executor.run(caller.plan([_drafted(0, 16)])).slots[0]
        assert isinstance(found, CapacityError) and "would write up to cache row" in found.message
    assert len(gpu.enqueued) == calls, "a slot that rests gets padding, too"
    found = executor.run(caller.plan([chunk(1, [1] * 16)])).slots[0]
    assert isinstance(found, CapacityError)
    caller.lengths = [most, most]
    assert isinstance(executor.run(caller.plan([_drafted(0, 16)])).slots[0], SlotResult)


# -- which tree a request gets -------------------------------------------------------------------------------------


def test_a_request_that_leaves_it_open_takes_the_bundles_tree_where_steps_run_ahead(on_gpu: Load, tiny_session: Session) -> None:
    from medusa_deploy.runtime import Request

    session = on_gpu()
    for request, is_fixed in (
        (Request(token_ids=[1]), True),
        (Request(token_ids=[1], lookup=False), True),
        (Request(token_ids=[1], lookup=True), False),
        (Request(token_ids=[1], rows=3), False),
        (Request(token_ids=[1], keep_hidden=True), False),
        (Request(token_ids=[1], params=SamplingParams(mode="sample")), False),
    ):
        assert isinstance(session._drafter(request, [1], None), FixedTree) is is_fixed
        assert not isinstance(tiny_session._drafter(request, [1], None), FixedTree)


def test_a_tree_and_lookup_contradict_each_other(tiny_session: Session) -> None:
    with pytest.raises(UsageError, match="a tree and lookup=True"):
        tiny_session.generate(token_ids=[1], tree=WIDE, lookup=True)
