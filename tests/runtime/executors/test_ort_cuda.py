"""The executor for an NVIDIA GPU, against the CPU's: the same class over host memory, and over a fake of the device's rules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Request, SamplingParams, Session, Tree, chain, load
from medusa_deploy.runtime.errors import CapacityError, DeployError, ProviderError, UsageError
from medusa_deploy.runtime.executors import ort_cuda
from medusa_deploy.runtime.executors.executor import CacheLayout
from medusa_deploy.runtime.executors.one_slot import prefill_rows
from medusa_deploy.runtime.executors.ort import OrtExecutor, OrtModel
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, Wanted, rows_to_move
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from support.fake_ort import CPU, CUDA, FakeOrt
from support.plans import EVERYTHING, plain_plan, prefill, run, tree_plan
from support.tiny import HEADS, HIDDEN, VOCAB
from support.trees import random_tree

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
SAMPLED = SamplingParams(mode="sample", temperature=0.9, seed=7)


def model_of(bundle: Bundle, slots: int) -> OrtModel:
    facts = bundle.manifest
    backbone, heads = facts.backbone, facts.heads
    layout = CacheLayout(backbone.layers, slots, backbone.kv_heads, facts.limits.cache_rows, backbone.head_dim, facts.dtype)
    paths = bundle.path(facts.variants["standard"]), bundle.path(facts.heads_graph)
    return OrtModel(*paths, layout, heads.num_heads, heads.top_k, backbone.hidden_size, backbone.vocab_size)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    import onnxruntime

    return use(monkeypatch, FakeOrt(onnxruntime))


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeOrt) -> FakeOrt:
    monkeypatch.setattr(ort_cuda, "import_onnxruntime", lambda _extra: fake)
    return fake


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Session:
    return Session(bundle, OrtExecutor(model_of(bundle, 3), threads=1))


def outputs(session: Session) -> list[Any]:
    """Greedy, sampled and several slots at a time, over prompts that take one chunk and more."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (1, 5, 16, 40)]
    found: list[Any] = []
    for prompt in prompts[1:3]:
        for options in ({"speculative": False}, {"tree": WIDE}, {"tree": WIDE, "params": SAMPLED}, {"rows": 6}):
            run = session.generate(token_ids=prompt, max_new_tokens=20, ignore_eos=True, **options)
            found.append((run.token_ids, run.stats.accepted))
    requests = [Request(token_ids=p, max_new_tokens=20 + i, ignore_eos=True, tree=WIDE) for i, p in enumerate(prompts)]
    found += sorted((index, run.token_ids) for index, run in session.generate_many(requests))
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_output_is_the_cpu_executors(bundle: Bundle, reference: Session, fake: FakeOrt, device: str) -> None:
    import onnxruntime

    if device == "cpu":
        fake.__dict__.update(vars(onnxruntime))  # the real module
    session = Session(bundle, OrtDeviceExecutor(model_of(bundle, 3), device, threads=1))
    assert outputs(session) == outputs(reference)


def test_logits_and_hidden_states_are_the_cpu_executors(bundle: Bundle, reference: Session, fake: FakeOrt) -> None:
    executors = [OrtDeviceExecutor(model_of(bundle, 3), threads=1), reference.executor]
    first, second = (prefill(executor, 1, np.arange(9), wanted=EVERYTHING) for executor in executors)
    assert first.logits is not None and first.logits.shape == (1, VOCAB)
    assert first.hidden is not None and first.hidden.shape == (1, HIDDEN)
    np.testing.assert_array_equal(first.logits, second.logits)
    np.testing.assert_array_equal(first.hidden, second.hidden)


def test_a_second_turn_starts_from_the_rows_of_the_first(bundle: Bundle, reference: Session) -> None:
    session = Session(bundle, OrtDeviceExecutor(model_of(bundle, 2), "cpu", threads=1))
    turn = [3 + place % 40 for place in range(45)]
    for _ in range(3):
        asked: dict[str, Any] = {"token_ids": turn, "max_new_tokens": 14, "ignore_eos": True}
        expected = reference.generate(**asked).token_ids
        other = session.stream(token_ids=[9, 8, 7], max_new_tokens=30, ignore_eos=True)
        next(other)
        found = session.generate(**asked)
        other.close()  # type: ignore[attr-defined]
        assert found.token_ids == expected
        assert (found.stats.cached_tokens > 40) == (len(turn) > 45)
        turn = [*turn, *expected, 1]


def test_caches_stay_where_they_are(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 2), threads=1)
    session = Session(bundle, executor)
    addresses = [cache.data_ptr() for cache in executor.caches]
    session.slots.acquire(SimpleNamespace(slot=-1))  # the second slot: a prefill that writes at the cache's beginning shows
    session.generate(token_ids=[3, 4, 5, 6], max_new_tokens=6, ignore_eos=True, tree=ROOT_ONLY)
    assert [cache.data_ptr() for cache in executor.caches] == addresses
    for cache in executor.caches:
        written = np.flatnonzero(cache.array[1].any(axis=(0, 2)))  # type: ignore[attr-defined]
        assert written.tolist() == list(range(HEADS, HEADS + 9))
        assert not cache.array[0].any(), "a slot outside of the call is not touched"  # type: ignore[attr-defined]


def test_a_cache_that_is_copied_is_noticed(bundle: Bundle, fake: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 1), threads=1)
    bind, bound = executor._bind, executor.caches[2]  # kept: bindings hold addresses, the executor holds the memory

    def then_swap(*arguments: Any) -> Any:
        found = bind(*arguments)  # bound to the caches of now
        executor.caches[2] = fake.OrtValue.ortvalue_from_numpy(bound.array, "cuda", 0)
        return found

    monkeypatch.setattr(executor, "_bind", then_swap)
    with pytest.raises(AssertionError, match="copied, not updated in place"):
        executor.run(plain_plan(1, 0, 5, 0))


def test_a_step_sends_its_small_inputs_and_nothing_else(bundle: Bundle, fake: FakeOrt) -> None:
    session = Session(bundle, OrtDeviceExecutor(model_of(bundle, 1), threads=1))
    session.generate(token_ids=[1, 2, 3], max_new_tokens=8, ignore_eos=True, speculative=False)
    step = fake.bindings[-1]
    names = ["tokens", "positions", "ancestors", "forced", "write_index", "logit_rows", "commit", "columns"]
    assert step.sent == names * 7
    assert len(fake.bindings) == 2, "one for the prefill, one for all steps"


@pytest.mark.parametrize(("length", "moves"), [(10_000, ()), (-HEADS, ()), (9, (10_000,)), (9, (-HEADS - 1,))])
def test_rows_outside_the_cache_are_refused(bundle: Bundle, fake: FakeOrt, length: int, moves: tuple[int, ...]) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 2), threads=1)
    before = [cache.array.copy() for cache in executor.caches]
    active = tuple([SlotRows(slot, np.arange(4), chain(3)) for slot in range(2)])
    for error in executor.run(StepPlan(active, (0, length), ((), moves))).slots:
        assert isinstance(error, CapacityError) and "a cache has rows 0 to" in error.message
        assert error.hint
    for cache, kept in zip(executor.caches, before, strict=True):
        np.testing.assert_array_equal(cache.array, kept)


def test_the_last_rows_of_the_cache_can_be_used(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 1), threads=1)
    run(executor, tree_plan(1, 0, chain(3), [1, 2, 3, 4], executor.layout.rows - 4 - HEADS))


# -- several slots -------------------------------------------------------------------------------------------------

FLAGS = [Wanted(*map(bool, flags)) for flags in np.ndindex(2, 2, 2)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [3, 4])
def test_a_batch_computes_what_each_slot_computes_alone(bundle: Bundle, slots: int, seed: int) -> None:
    """Random steps: trees of different shapes, resting slots between them with and without rows to move, prefill beside them."""
    rng = np.random.default_rng(seed)
    device, alone = OrtDeviceExecutor(model_of(bundle, slots), "cpu", threads=1), OrtExecutor(model_of(bundle, slots), threads=1)
    lengths = [0] * slots
    moves: list[tuple[int, ...]] = [()] * slots
    seen = dict.fromkeys(("batches", "rests between", "moves while resting", "prefill beside decoding", "moves"), 0)
    for _ in range(36):
        active: list[SlotRows] = []
        for slot in rng.permutation(slots).tolist():
            chance = rng.random()
            if lengths[slot] == 0 or (chance < 0.2 and not moves[slot]):
                chunk = rng.integers(0, VOCAB, int(rng.integers(2, 17)))
                active.append(prefill_rows(slot, chunk, FLAGS[int(rng.integers(len(FLAGS)))]))
            elif chance < 0.75:
                tree = random_tree(rng, depth=HEADS)
                wanted = FLAGS[int(rng.integers(len(FLAGS)))]
                active.append(SlotRows(slot, rng.integers(0, VOCAB, tree.rows), tree, wanted=wanted))
        _count(seen, active, moves)
        plan = StepPlan(tuple(active), tuple(lengths), tuple(moves))
        for rows, mine, theirs in zip(active, run(device, plan), run(alone, plan), strict=True):
            _assert_same(mine, theirs)
            # The deepest last path counts as accepted, so that rows are moved often.
            path = () if rows.prefills else rows.shape.row_paths[-1]
            grown = rows.count if rows.prefills else 1 + len(path)
            moves[rows.slot] = rows_to_move(lengths[rows.slot], path)
            lengths[rows.slot] += grown
        for slot in set(range(slots)) - {rows.slot for rows in active}:
            moves[slot] = ()
        for slot in range(slots):
            end = HEADS + lengths[slot] - len(moves[slot])
            for cache, others in zip(device.caches, alone.caches, strict=True):
                np.testing.assert_allclose(cache.numpy()[slot, :, HEADS:end], others[slot, :, HEADS:end], atol=2e-5)
            if lengths[slot] > 160:
                lengths[slot], moves[slot] = 0, ()
    assert all(seen.values()), seen


def _count(seen: dict[str, int], active: list[SlotRows], moves: list[tuple[int, ...]]) -> None:
    decoding = {rows.slot for rows in active if not rows.prefills}
    resting = [slot for slot in range(len(moves)) if slot not in {rows.slot for rows in active}]
    seen["batches"] += len({rows.shape.parents.tobytes() for rows in active if not rows.prefills}) > 1
    seen["rests between"] += any(min(decoding, default=slot) < slot < max(decoding, default=slot) for slot in resting)
    seen["moves while resting"] += any(moves[slot] for slot in resting)
    seen["prefill beside decoding"] += 0 < len(decoding) < len(active)
    seen["moves"] += any(moves[slot] for slot in decoding)


def _assert_same(mine: SlotResult, theirs: SlotResult) -> None:
    assert (mine.last_row, mine.next_token) == (theirs.last_row, theirs.next_token)
    assert mine.finite and theirs.finite
    for name in ("logits", "hidden", "candidates", "log_probs"):
        one, other = getattr(mine, name), getattr(theirs, name)
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)


def test_a_chunk_that_fails_leaves_the_decoding_slots_their_results(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 2), threads=1)
    prefill(executor, 0, [1, 2, 3])
    expected = run(executor, plain_plan(2, 0, 4, 3))[0].next_token
    active = (prefill_rows(1, np.arange(4)), SlotRows(0, np.array([4]), ROOT_ONLY))
    failed, decoded = executor.run(StepPlan(active, (3, executor.layout.rows), ((), ()))).slots
    assert isinstance(failed, CapacityError)
    assert isinstance(decoded, SlotResult) and decoded.next_token == expected


# -- refusals ------------------------------------------------------------------------------------------------------


def refused(bundle: Bundle) -> DeployError:
    with pytest.raises(ProviderError) as caught:
        OrtDeviceExecutor(model_of(bundle, 1))
    assert caught.value.hint
    return caught.value


def test_a_silent_fallback_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    missing = "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file: No such file or directory"
    fake = use(monkeypatch, FakeOrt(onnxruntime, falls_back=True, said=f"{missing}\nPlease follow the docs"))
    error = refused(bundle)
    assert error.message == f"asked for {CUDA}, got ['{CPU}']"
    assert "nvidia-smi" in error.hint and "Failed to load libcublas.so.13" in error.hint
    assert "Please follow" not in error.hint
    assert fake.asked[0][0][1]["use_tf32"] == "0"


def test_the_package_without_cuda_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    use(monkeypatch, FakeOrt(onnxruntime, available=(CPU,)))
    error = refused(bundle)
    assert f"has no {CUDA}, only {CPU}" in error.message
    assert "onnxruntime-gpu" in error.hint


def test_the_installed_package_refuses(bundle: Bundle) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    assert CUDA in refused(bundle).message


def test_a_bundle_is_loaded_on_the_gpu(tiny_bundle: Path, fake: FakeOrt, reference: Session) -> None:
    session = load(tiny_bundle, backend="cuda", slots=3)
    assert isinstance(session.executor, OrtDeviceExecutor) and session.executor.device == "cuda"
    options: dict[str, Any] = {"token_ids": [7, 8, 9], "max_new_tokens": 12, "ignore_eos": True}
    assert session.generate(**options).token_ids == reference.generate(**options).token_ids


@pytest.mark.parametrize("options", [{"variant": "cpu"}, {"target": "sm_89"}, {"threads": 2}], ids=str)
def test_options_of_other_backends_are_refused(tiny_bundle: Path, fake: FakeOrt, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the backend cuda"):
        load(tiny_bundle, backend="cuda", **options)
    assert fake.asked == []


def test_a_session_that_fails_is_named(bundle: Bundle, fake: FakeOrt) -> None:
    fake.failure = ValueError("CUDA error 100: no CUDA-capable device is detected")
    error = refused(bundle)
    assert "can't load step.onnx: CUDA error 100" in error.message


def test_a_full_device_is_named(bundle: Bundle, fake: FakeOrt) -> None:
    fake.full = True
    error = refused(bundle)
    assert "no room for 4 caches" in error.message and "fewer slots" in error.hint
