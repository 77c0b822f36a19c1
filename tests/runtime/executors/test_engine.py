"""The same promises over ONNX Runtime and a traced model: exact, in place, nothing allocated."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.runtime import ROOT_ONLY, Generation, Request, SamplingParams, Session, Tree, chain, load
from medusa_deploy.runtime.errors import BundleIntegrityError, UsageError
from medusa_deploy.runtime.executors.ort import Bound
from medusa_deploy.runtime.executors.step_plan import Wanted
from support.tiny import EOS, HEADS, HIDDEN, VOCAB
from support.trees import random_tree

WIDE = Tree.from_choices([(a, *rest) for a in range(3) for rest in [(), (0,), (1,), (0, 0)]])
VARIANTS = ["cpu", "standard"]


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Path, tiny_session: Session) -> dict[str, Session]:
    """One slot each, over both graphs."""
    return {"cpu": tiny_session, "standard": load(tiny_bundle, threads=1, variant="standard")}


@pytest.fixture(scope="module")
def four_slots(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, slots=4, threads=1)


def _prompt(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, VOCAB, length)]


def _plain(session: Session, prompt: list[int], count: int) -> Generation:
    return session.generate(token_ids=prompt, max_new_tokens=count, ignore_eos=True, speculative=False)


# -- exact ---------------------------------------------------------------------------------------------------------


def test_plain_decoding_is_transformers_greedy_decoding(sessions: dict[str, Session], tiny_model: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(tiny_model)
    rng = np.random.default_rng(1)
    for length in (1, 5, 16, 17, 50):
        prompt = _prompt(rng, length)
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(torch.tensor([prompt]), **options)[0, length:].tolist()
        for variant in VARIANTS:
            assert _plain(sessions[variant], prompt, 24).token_ids == expected, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculative_greedy_is_plain_greedy(sessions: dict[str, Session], variant: str) -> None:
    session, rng, accepted = sessions[variant], np.random.default_rng(2), 0
    for length in (1, 2, 7, 16, 17, 33, 48, 60):
        prompt = _prompt(rng, length)
        expected = _plain(session, prompt, 32).token_ids
        for tree in (chain(1), chain(HEADS), WIDE, random_tree(rng), random_tree(rng)):
            generation = session.generate(token_ids=prompt, max_new_tokens=32, ignore_eos=True, tree=tree)
            assert generation.token_ids == expected, tree
            accepted += 31 - generation.stats.steps
    assert accepted > 100, "hardly a draft was accepted: this test has shown little"


def test_many_slots_are_the_same_as_one(sessions: dict[str, Session], four_slots: Session) -> None:
    rng = np.random.default_rng(3)
    params = [
        SamplingParams(),
        SamplingParams(mode="sample", temperature=0.5, seed=5),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(mode="typical", temperature=0.3),
    ]
    requests = [
        Request(
            token_ids=_prompt(rng, int(rng.integers(1, 60))),
            max_new_tokens=int(rng.integers(1, 30)),
            params=params[index % 4],
            tree=[None, ROOT_ONLY, WIDE, chain(2), random_tree(rng)][index % 5],
            ignore_eos=bool(index % 3),
            keep_hidden=index % 2 == 0,
        )
        for index in range(12)
    ]
    found = dict(four_slots.generate_many(requests))
    for index, request in enumerate(requests):
        for session in sessions.values():
            ((_, expected),) = session.generate_many([request])
            assert found[index].token_ids == expected.token_ids
            assert found[index].finish_reason == expected.finish_reason
            if request.tree is not None:  # how many rows are chosen depends on who else decodes
                assert found[index].stats.accepted == expected.stats.accepted
            if request.keep_hidden:
                np.testing.assert_allclose(found[index].hidden, expected.hidden, atol=2e-4)  # type: ignore[arg-type]


def test_sampling_with_equal_seeds_is_the_same_with_and_without_drafts(tiny_session: Session) -> None:
    for seed in range(6):
        params = SamplingParams(mode="sample", temperature=0.6, top_p=0.9, seed=seed)
        answers = {
            tuple(
                tiny_session.generate(token_ids=[7, 8, 9], max_new_tokens=32, ignore_eos=True, params=params, tree=tree).token_ids
            )
            for tree in (ROOT_ONLY, chain(2), WIDE)
        }
        assert len(answers) == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "tree", [chain(HEADS), Tree.from_choices([(a, b) for a in range(3) for b in range(4)] + [(a,) for a in range(3)])]
)
def test_a_slot_fills_to_its_capacity(sessions: dict[str, Session], variant: str, tree: Tree) -> None:
    prompt = _prompt(np.random.default_rng(4), 200)
    assert tree.rows > 1
    expected = _plain(sessions["standard"], prompt, 56).token_ids
    generation = sessions[variant].generate(token_ids=prompt, max_new_tokens=56, ignore_eos=True, tree=tree)
    assert generation.token_ids == expected
    assert generation.finish_reason == "length"


def test_an_end_of_sequence_token_of_the_checkpoint_ends_the_answer(tiny_session: Session) -> None:
    for seed in range(200):
        params = SamplingParams(mode="sample", seed=seed, logit_bias={EOS: 2.0})
        generation = tiny_session.generate(token_ids=[5], max_new_tokens=60, params=params)
        assert (EOS in generation.token_ids) == (generation.finish_reason == "stop")
        if generation.finish_reason == "stop":
            assert generation.token_ids.index(EOS) == len(generation.token_ids) - 1
            return
    pytest.fail("no answer ended")


def test_hidden_states_are_the_models(tiny_session: Session, tiny_model: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    generation = tiny_session.generate(token_ids=[9, 8, 7], max_new_tokens=20, ignore_eos=True, keep_hidden=True, tree=WIDE)
    assert generation.hidden is not None and generation.hidden.shape == (20, HIDDEN)
    ids = torch.tensor([[9, 8, 7, *generation.token_ids]])
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tiny_model).model(ids).last_hidden_state[0, 2:-1]
    np.testing.assert_allclose(generation.hidden, expected.numpy(), atol=2e-4)


def test_threads_share_an_engine(four_slots: Session, tiny_session: Session) -> None:
    prompts = [[10, 11], [20] * 20, [30, 31, 32]]
    expected = [_plain(tiny_session, prompt, 30).token_ids for prompt in prompts]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = four_slots.generate(token_ids=prompts[index], max_new_tokens=30, ignore_eos=True, tree=WIDE).token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected
    assert four_slots.slots.free == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_verifies_trees_of_several_slots(tiny_bundle: Path, tiny_session: Session, variant: str) -> None:
    session = load(tiny_bundle, slots=3, variant=variant, threads=1)
    prompts = [[10, 11], [20] * 20, [30, 31, 32], [4]]
    expected = [_plain(tiny_session, prompt, 12).token_ids for prompt in prompts]
    for tree in (ROOT_ONLY, WIDE, chain(1), None):
        requests = [Request(token_ids=prompt, max_new_tokens=12, ignore_eos=True, tree=tree) for prompt in prompts]
        found = dict(session.generate_many(requests))
        assert [found[index].token_ids for index in range(4)] == expected
        assert session.slots.free == 3


# -- in place, without allocation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_caches_are_updated_where_they_are(sessions: dict[str, Session], variant: str) -> None:
    session = sessions[variant]
    executor = session.executor
    caches: np.ndarray = executor.caches  # type: ignore[attr-defined]
    values = executor._cache_values  # type: ignore[attr-defined]
    addresses = [[value.data_ptr() for value in of_slot] for of_slot in values]
    assert addresses == [[cache[slot].ctypes.data for cache in caches] for slot in range(len(values))]
    caches[:] = 0
    prompt = [3, 4, 5, 6]
    stream = session.stream(token_ids=prompt, max_new_tokens=10, ignore_eos=True, tree=ROOT_ONLY)
    next(stream)
    written = np.flatnonzero(caches.any(axis=(0, 1, 2, 4)))
    assert written.tolist() == list(range(HEADS, HEADS + 4)), "the prompt lies after the margin"
    before = caches.copy()
    next(stream)
    assert np.flatnonzero((caches != before).any(axis=(0, 1, 2, 4))).tolist() == [HEADS + 4]
    stream.close()  # type: ignore[attr-defined]
    assert executor.caches is caches  # type: ignore[attr-defined]
    assert [[value.data_ptr() for value in of_slot] for of_slot in values] == addresses


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_every_size_see_the_text_as_it_grows_and_as_it_starts_anew(sessions: dict[str, Session], variant: str) -> None:
    """Each size has inputs of its own, bound at another length of the text than the one that the next step has."""
    session = sessions[variant]
    prompts = [_prompt(np.random.default_rng(seed), length) for seed, length in enumerate((40, 5, 110))]
    answers = [_plain(session, prompt, 60).token_ids for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        for place in (1, 21, 31, 59):  # the prefill alone tells what comes next
            assert _plain(session, prompt + answer[:place], 1).token_ids == [answer[place]]
    for trees in ([chain(HEADS), WIDE], [WIDE, ROOT_ONLY, chain(1)]):
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tree = trees[number % len(trees)]
            assert session.generate(token_ids=prompt, max_new_tokens=60, ignore_eos=True, tree=tree).token_ids == answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_allocates_nothing(sessions: dict[str, Session], variant: str) -> None:
    session = sessions[variant]
    stream = session.stream(token_ids=[3, 4, 5], max_new_tokens=200, ignore_eos=True, tree=WIDE)
    for _ in range(10):
        next(stream)
    bound = _bound(session, WIDE.rows, Wanted(heads=True))
    tracemalloc.start()
    try:
        next(stream)
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(40):
            next(stream)
        grown = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
    assert _bound(session, WIDE.rows, Wanted(heads=True)) is bound
    # What stays is the answer's own text pieces and tokens, far less than any buffer of a step.
    assert grown < 40 * 400


def _bound(session: Session, rows: int, wanted: Wanted) -> Bound:
    """What the executor keeps for steps of ``rows`` rows."""
    found: Bound = session.executor._bound._kept[(0, rows, False, wanted)]  # type: ignore[attr-defined]
    return found


def test_only_what_is_wanted_is_computed(tiny_session: Session) -> None:
    _plain(tiny_session, [1, 2], 5)
    outputs = _bound(tiny_session, 1, Wanted()).outputs
    assert outputs.logits.shape == (1, 0, VOCAB)
    assert outputs.hidden.shape == (1, 1, HIDDEN), "plain steps tell NaN by it"
    outputs.candidates[:] = -1
    _plain(tiny_session, [1, 2], 5)
    assert (outputs.candidates == -1).all()


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 0}, "0 slots, the bundle allows 1 to 16"),
        ({"slots": 17}, "17 slots, the bundle allows 1 to 16"),
        ({"slots": 5, "variant": "standard"}, "5 slots, the bundle allows 1 to 4"),
        ({"variant": "gpu"}, "no variant 'gpu'"),
    ],
    ids=str,
)
def test_a_bundle_is_not_loaded_as_what_it_is_not(tiny_bundle: Path, options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load(tiny_bundle, **options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_tampered_weight_is_not_loaded(bundle_copy: Path) -> None:
    weights = bundle_copy / "onnx" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match="weights.bin has sha256"):
        load(bundle_copy)
