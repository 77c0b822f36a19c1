"""What must hold on real weights, with a real tokenizer and trained heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime import ROOT_ONLY, Request, SamplingParams, Session, load
from medusa_deploy.runtime.errors import CapacityError
from medusa_deploy.tools.exactness.verify import verify
from medusa_deploy.tools.prompt_source import heldout_prompts, prompts_for
from medusa_deploy.tools.tree_set import NAMES, trees_for

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("speculative", [False, True])
def test_it_knows_the_capital_of_france(smollm2: Session, speculative: bool) -> None:
    answer = smollm2.generate(messages=QUESTION, speculative=speculative, max_new_tokens=32)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text


def test_speculative_greedy_is_plain_greedy_for_every_tree(smollm2: Session) -> None:
    chosen = trees_for(smollm2.manifest)
    assert set(NAMES) <= {*chosen.trees, *chosen.skipped}
    report = verify(smollm2, prompts_for(smollm2, None, 4), trees=chosen.trees, max_new_tokens=32)
    assert report["unexplained"] == 0, report
    assert len(report["trees"]) >= 6
    assert report["trees"]["chain"]["mean_acceptance_length"] > 1.3, "the heads guess nothing"


def test_the_standard_graph_says_the_same(smollm2: Session, smollm2_bundle: Path) -> None:
    standard = load(smollm2_bundle, variant="standard", check_hashes=False)
    prompts = prompts_for(smollm2, None, 3)
    report = verify(standard, prompts, trees={"default": standard.tree}, max_new_tokens=24)
    assert report["unexplained"] == 0, report
    for prompt in prompts:
        expected = smollm2.generate(token_ids=prompt, max_new_tokens=24).token_ids
        assert standard.generate(token_ids=prompt, max_new_tokens=24).token_ids == expected


def test_several_slots_say_what_one_says(smollm2: Session, smollm2_bundle: Path) -> None:
    lines = heldout_prompts()[:5]
    requests = [line.request(max_new_tokens=12 + 6 * index) for index, line in enumerate(lines)]
    requests[1] = lines[1].request(max_new_tokens=20, tree=ROOT_ONLY)
    batched = load(smollm2_bundle, slots=3, check_hashes=False)
    together = {index: generation.token_ids for index, generation in batched.generate_many(requests)}
    for index, request in enumerate(requests):
        alone = smollm2.generate(messages=request.messages, max_new_tokens=request.max_new_tokens)
        assert together[index] == alone.token_ids


def test_a_long_prompt_is_prefilled_in_chunks(smollm2: Session) -> None:
    chunk = smollm2.manifest.limits.prefill_chunk
    text = "The harbour master wrote down every ship. " * 60 + "What did the harbour master write down?"
    prompt = smollm2.encode(Request(messages=[{"role": "user", "content": text}]))
    assert len(prompt) > 2 * chunk
    plain = smollm2.generate(token_ids=prompt, speculative=False, max_new_tokens=24)
    assert "ship" in plain.text
    assert smollm2.generate(token_ids=prompt, max_new_tokens=24).token_ids == plain.token_ids


def test_a_second_turn_starts_at_least_five_times_sooner(smollm2_bundle: Path) -> None:
    cold, warm = (load(smollm2_bundle, slots=2, check_hashes=False, prefix_cache=on) for on in (False, True))
    text = "The harbour master wrote down every ship. " * 140 + "What did the harbour master write down?"
    first = warm.encode(Request(messages=[{"role": "user", "content": text}]))
    assert len(first) >= 1000
    answer = warm.generate(token_ids=first, max_new_tokens=8).token_ids
    turns = [[*first, *answer, *warm.encode(Request(prompt=ask))] for ask in (" Where?", " When?", " Who was there?")]
    for second in turns:
        before, after = (session.generate(token_ids=second, max_new_tokens=12) for session in (cold, warm))
        assert after.token_ids == before.token_ids
        assert after.stats.cached_tokens >= 1000 and before.stats.cached_tokens == 0
        assert 5 * after.stats.prefill_seconds <= before.stats.prefill_seconds
    assert warm.prefix_stats.hits == len(turns)


def test_equal_seeds_give_equal_text_with_and_without_speculation(smollm2: Session) -> None:
    params = SamplingParams(mode="sample", temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=7)
    messages = [{"role": "user", "content": "Tell me about a walk by the sea."}]
    runs = [smollm2.generate(messages=messages, params=params, max_new_tokens=48, speculative=flag) for flag in (False, True)]
    assert runs[0].token_ids == runs[1].token_ids
    assert runs[1].stats.steps < runs[0].stats.steps


def test_stop_strings_and_capacity(smollm2: Session) -> None:
    full = smollm2.generate(messages=QUESTION, max_new_tokens=32).text
    stop = full[4:12]
    cut = smollm2.generate(messages=QUESTION, max_new_tokens=32, stop=(stop,))
    assert cut.text == full[: full.index(stop)]
    assert cut.finish_reason == "stop"
    with pytest.raises(CapacityError, match="capacity of 2048"):
        smollm2.generate(messages=QUESTION, max_new_tokens=4096)
    assert smollm2.slots.free == 1


def test_plain_greedy_is_transformers_greedy(smollm2: Session, smollm2_bundle: Path) -> None:
    from medusa_deploy.tools.exactness.reference import load_reference

    reference = load_reference(smollm2_bundle.parent / "smollm2", smollm2.manifest.dtype)
    prompts = prompts_for(smollm2, None, 3)
    report = verify(smollm2, prompts, trees={"default": smollm2.tree}, max_new_tokens=24, reference=reference)
    assert report["reference"]["unexplained"] == 0, report


def test_medusa_2_is_exact_accepts_more_and_stays_close_to_the_backbone(smollm2: Session, tmp_path: Path) -> None:
    from medusa_deploy.export.exporter import export_bundle
    from medusa_deploy.runtime.files.heads_file import read_heads_config

    folder = ROOT / "heads" / "smollm2-135m-instruct" / "medusa-2"
    quality = read_heads_config(folder)["quality"]
    assert all(quality["tuned"][text] <= 1.02 * quality["backbone"][text] for text in quality["backbone"])
    export_bundle(ROOT / "build" / "smollm2", folder, tmp_path / "bundle")
    tuned = load(tmp_path / "bundle")
    prompts = prompts_for(tuned, None, 4)
    report = verify(tuned, prompts, trees=trees_for(tuned.manifest, ["chain", "published"]).trees, max_new_tokens=32)
    assert report["unexplained"] == 0
    assert all(tree["mean_acceptance_length"] > 1.5 for tree in report["trees"].values())
    own = [session.generate(token_ids=prompts[2], max_new_tokens=32, speculative=False).token_ids for session in (smollm2, tuned)]
    assert own[0] != own[1], "the adapter changes nothing"
