"""The executor for an NVIDIA GPU, against the CPU's: the same class over host memory, and over a fake of the device's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Request, SamplingParams, Session, Tree, load
from medusa_deploy.runtime.errors import CapacityError, DeployError, ProviderError, UsageError
from medusa_deploy.runtime.executors import ort_cuda
from medusa_deploy.runtime.executors.executor import CacheLayout, Wanted
from medusa_deploy.runtime.executors.ort import OrtExecutor, OrtModel
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from support.fake_ort import CPU, CUDA, FakeOrt
from support.tiny import HEADS, HIDDEN, VOCAB

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
    return Session(bundle, OrtExecutor(model_of(bundle, 3), threads=1), 3)


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
    session = Session(bundle, OrtDeviceExecutor(model_of(bundle, 3), device, threads=1), 3)
    assert outputs(session) == outputs(reference)


def test_logits_and_hidden_states_are_the_cpu_executors(bundle: Bundle, reference: Session, fake: FakeOrt) -> None:
    wanted = Wanted(heads=True, logits=True, hidden=True)
    executors = [OrtDeviceExecutor(model_of(bundle, 3), threads=1), reference.executor]
    chunk = np.arange(9)
    first, second = ([getattr(e.prefill(1, chunk, 0, wanted), name) for name in ("logits", "hidden")] for e in executors)
    assert first[0].shape == (1, 1, VOCAB) and first[1].shape == (1, 1, HIDDEN)
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_caches_stay_where_they_are(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 2), threads=1)
    session = Session(bundle, executor, 2)
    addresses = [cache.data_ptr() for cache in executor.caches]
    session.slots.acquire()  # the second slot: a prefill that writes at the cache's beginning shows
    session.generate(token_ids=[3, 4, 5, 6], max_new_tokens=6, ignore_eos=True, tree=ROOT_ONLY)
    assert [cache.data_ptr() for cache in executor.caches] == addresses
    for cache in executor.caches:
        written = np.flatnonzero(cache.array[1].any(axis=(0, 2)))  # type: ignore[attr-defined]
        assert written.tolist() == list(range(HEADS, HEADS + 9))
        # The idle slot's row is written past its length of 0 in every step, and seen by nobody.
        assert np.flatnonzero(cache.array[0].any(axis=(0, 2))).tolist() == [HEADS]  # type: ignore[attr-defined]


def test_a_cache_that_is_copied_is_noticed(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 1), threads=1)
    buffers = executor.buffers(1, Wanted())  # bound to the caches of now
    bound = executor.caches[2]  # kept: bindings hold addresses, the executor holds the memory
    executor.caches[2] = fake.OrtValue.ortvalue_from_numpy(bound.array, "cuda", 0)
    buffers.idle(0, 0)
    with pytest.raises(AssertionError, match="copied, not updated in place"):
        executor.step(buffers, Wanted())


def test_a_step_sends_its_small_inputs_and_nothing_else(bundle: Bundle, fake: FakeOrt) -> None:
    session = Session(bundle, OrtDeviceExecutor(model_of(bundle, 1), threads=1), 1)
    session.generate(token_ids=[1, 2, 3], max_new_tokens=8, ignore_eos=True, speculative=False)
    step = fake.bindings[-1]
    names = ["tokens", "positions", "ancestors", "forced", "write_index", "logit_rows", "commit", "columns"]
    assert step.sent == names * 7
    assert len(fake.bindings) == 2, "one for the prefill, one for all steps"


@pytest.mark.parametrize(("field", "value"), [("write_index", 10_000), ("write_index", 0), ("commit", 10_000), ("commit", -1)])
def test_rows_outside_the_cache_are_refused(bundle: Bundle, fake: FakeOrt, field: str, value: int) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 2), threads=1)
    before = [cache.array.copy() for cache in executor.caches]
    buffers = executor.buffers(4, Wanted())
    for slot in range(2):
        buffers.idle(slot, 0)
    getattr(buffers, field)[1] = value
    with pytest.raises(CapacityError, match="a cache has rows 0 to") as caught:
        executor.step(buffers, Wanted())
    assert caught.value.hint
    for cache, kept in zip(executor.caches, before, strict=True):
        np.testing.assert_array_equal(cache.array, kept)


def test_the_last_rows_of_the_cache_can_be_used(bundle: Bundle, fake: FakeOrt) -> None:
    executor = OrtDeviceExecutor(model_of(bundle, 1), threads=1)
    buffers = executor.buffers(4, Wanted())
    buffers.idle(0, executor.layout.rows - 4 - HEADS)
    executor.step(buffers, Wanted())


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
