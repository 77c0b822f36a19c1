"""Training on a task that heads can learn perfectly: it is learnt, it is repeatable, and it goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from medusa_deploy.calibration.answers import answers as answers_module  # noqa: E402
from medusa_deploy.calibration.answers.answers import Answer  # noqa: E402
from medusa_deploy.calibration.training.examples import IGNORE, Examples, draft_vocabulary, load_examples  # noqa: E402
from medusa_deploy.calibration.training.train import train_heads  # noqa: E402
from medusa_deploy.runtime.errors import TrainingError  # noqa: E402
from medusa_deploy.runtime.files.heads import HeadSet  # noqa: E402
from support.learnable import CONFIG, HEADS, HIDDEN, VOCAB, backbone, examples, hit_rates, same_tensors  # noqa: E402


def _train(config: object = CONFIG, data: Examples | None = None, **options: object) -> HeadSet:
    return train_heads(data or examples(), *backbone(), config, **options)  # type: ignore[arg-type]


def test_what_the_hidden_state_tells_is_learnt() -> None:
    for kind in ("medusa", "grounded"):
        heads = _train(replace(CONFIG, kind=kind))
        rates = hit_rates(heads, examples(seed=1), *backbone(), ranks=3)
        assert (rates[:, 0] > 0.98).all(), kind


def test_only_grounded_heads_learn_what_the_root_tells() -> None:
    data, unseen = examples(told_by="root"), examples(told_by="root", seed=1)
    grounded = hit_rates(_train(replace(CONFIG, kind="grounded"), data), unseen, *backbone(), ranks=1)
    plain = hit_rates(_train(data=data), unseen, *backbone(), ranks=1)
    assert (grounded > 0.98).all()
    assert (plain < 0.3).all()


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_inputs_of_very_different_sizes_are_learnt_alike(scale: float) -> None:
    """An embedding is often a tenth of a hidden state in size; both must be learnt, and the exported record must see them raw."""
    embedding, output_weight = backbone()
    data, unseen = examples(told_by="root"), examples(told_by="root", seed=1)
    heads = train_heads(data, embedding * scale, output_weight, replace(CONFIG, kind="grounded"))
    rates = hit_rates(heads, unseen, embedding * scale, output_weight, ranks=1)
    assert (rates > 0.98).all()


def test_autocast_learns_the_same_task() -> None:
    heads = _train(replace(CONFIG, autocast=True))
    assert (hit_rates(heads, examples(seed=1), *backbone(), ranks=1) > 0.98).all()


def test_heads_are_a_valid_record_in_half_precision() -> None:
    heads = _train(replace(CONFIG, kind="grounded", num_layers=2, epochs=1))
    heads.validate()
    assert (heads.config.kind, heads.config.num_heads, heads.config.num_layers) == ("grounded", HEADS, 2)
    assert (heads.config.hidden_size, heads.config.draft_vocab_size, heads.config.projection) == (HIDDEN, VOCAB, "pruned")
    assert {array.dtype for name, array in heads.tensors.items() if name != "token_map"} == {np.dtype(np.float16)}


def test_equal_seeds_give_equal_heads_and_others_do_not() -> None:
    config = replace(CONFIG, epochs=1)
    heads = _train(config)
    torch.rand(5)  # whatever the process drew before
    assert same_tensors(heads, _train(config))
    assert not same_tensors(heads, _train(replace(config, seed=1)))


class _InterruptedError(Exception):
    pass


def test_a_run_that_goes_on_from_its_checkpoint_ends_in_the_same_heads(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=4, dropout=0.3)
    whole = _train(config)
    path = tmp_path / "checkpoint.pt"

    def interrupt(step: int, total: int, loss: float) -> None:
        assert total == 80
        if step == 60:  # the end of the third epoch, before its checkpoint
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        _train(config, checkpoint=path, progress=interrupt)
    steps: list[int] = []
    resumed = _train(config, checkpoint=path, progress=lambda step, total, loss: steps.append(step))
    assert steps == [60, 80], "two epochs were done"
    assert same_tensors(resumed, whole)
    done: list[int] = []
    assert same_tensors(_train(config, checkpoint=path, progress=lambda step, total, loss: done.append(step)), whole)
    assert done == [], "a finished run has nothing left to do"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    _train(replace(CONFIG, epochs=1), checkpoint=path)
    with pytest.raises(TrainingError, match="other settings") as caught:
        _train(replace(CONFIG, epochs=2), checkpoint=path)
    assert caught.value.hint


def test_a_diverged_loss_is_a_named_error() -> None:
    data = examples()
    data.hidden[:] = float("inf")
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        _train(data=data)
    assert "learning-rate" in caught.value.hint


def test_a_head_without_a_label_in_a_batch_does_not_spoil_it() -> None:
    data = examples()
    data.labels[:, 1] = IGNORE
    losses: list[float] = []
    heads = _train(data=data, progress=lambda step, total, loss: losses.append(loss))
    assert np.isfinite(losses).all()
    heads.validate()
    assert hit_rates(heads, examples(seed=1), *backbone(), ranks=1)[0, 0] > 0.98
    assert hit_rates(heads, data, *backbone(), ranks=1)[1, 0] == 0, "no label, no hit"


def test_fewer_examples_than_a_batch_still_train() -> None:
    few = examples(10)
    heads = _train(data=Examples(few.hidden, few.roots, few.labels))
    assert heads.tensors["head.0.layer.0.weight"].any()


def test_labels_outside_the_draft_vocabulary_are_left_out() -> None:
    data = examples()
    common = torch.arange(5)
    data.roots[:] = common[data.roots % 5]
    heads = _train(replace(CONFIG, draft_vocab_size=4), data)
    assert heads.tensors["token_map"].tolist() == draft_vocabulary(data.roots, 4).tolist()
    rates = hit_rates(heads, data, *backbone(), ranks=4)
    reachable = np.isin(data.labels.numpy(), heads.tensors["token_map"]).mean(0)
    assert (rates.sum(1) <= reachable + 1e-9).all(), "what the draft vocabulary lacks is a miss"
    assert (rates[:, 0] > 0.9 * reachable).all()


def test_the_draft_vocabulary_holds_the_most_frequent_tokens_in_order() -> None:
    tokens = torch.tensor([7, 7, 7, 9, 9, 2, 2, 5, IGNORE, IGNORE, IGNORE, IGNORE])
    assert draft_vocabulary(tokens, 2).tolist() == [2, 7], "of equally frequent tokens the smaller id"
    assert draft_vocabulary(tokens, 3).tolist() == [2, 7, 9]
    assert draft_vocabulary(tokens, 99).tolist() == [2, 5, 7, 9]


def test_examples_are_the_tokens_that_follow_each_root(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    answers = [
        Answer(index, rng.integers(0, 50, length), rng.normal(size=(length, 3)).astype(np.float16))
        for index, length in enumerate([1, 2, 7])
    ]
    answers_module._write_shard(tmp_path, answers[:2])
    answers_module._write_shard(tmp_path, answers[2:])
    data = load_examples(tmp_path, 3)
    row = 0
    for answer in answers:
        for position, token in enumerate(answer.tokens):
            assert data.roots[row] == token
            assert data.hidden[row].tolist() == answer.hidden[position].tolist()
            following = answer.tokens[position + 1 : position + 4].tolist()
            assert data.labels[row].tolist() == following + [IGNORE] * (3 - len(following))
            row += 1
    assert row == len(data.roots)


def test_no_answers_are_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no answers") as caught:
        load_examples(tmp_path, 3)
    assert caught.value.hint
