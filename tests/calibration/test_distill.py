"""Answers of the backbone on disk: complete, aligned with their hidden states, and never made twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.calibration.answers import answers as module
from medusa_deploy.calibration.answers.answers import DESCRIPTION, Answer, iter_shards
from medusa_deploy.calibration.answers.distill import RuntimeAnswerer, distill
from medusa_deploy.runtime import SamplingParams, chain
from medusa_deploy.runtime.errors import TrainingError
from support.fake_executor import FakeSession, fake_session

PROMPTS = [[1 + index] * (1 + index % 4) for index in range(7)]
TOKENS = 12


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD", 2)


def _answers(folder: Path) -> dict[int, Answer]:
    answers = [answer for shard in iter_shards(folder) for answer in shard]
    assert len({answer.question for answer in answers}) == len(answers), "a question was answered twice"
    return {answer.question: answer for answer in answers}


def _distill(session: FakeSession, *arguments: Any, **options: Any) -> int:
    return distill(RuntimeAnswerer(session), *arguments, **options)


def _same(one: dict[int, Answer], other: dict[int, Answer]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[index].tokens, other[index].tokens)
        and np.array_equal(one[index].hidden[:, 0], other[index].hidden[:, 0])
        for index in one
    )


@pytest.mark.parametrize("slots", [1, 3])
def test_every_prompt_is_answered_once_with_the_states_behind_each_token(tmp_path: Path, slots: int) -> None:
    session = fake_session(slots, tree=chain(3))
    seen: list[tuple[int, int, int]] = []
    total = _distill(session, PROMPTS, tmp_path / "data", max_new_tokens=TOKENS, progress=lambda *numbers: seen.append(numbers))
    answers = _answers(tmp_path / "data")
    assert sorted(answers) == list(range(len(PROMPTS)))
    assert total == TOKENS * len(PROMPTS)
    assert seen == [(done, len(PROMPTS), TOKENS * done) for done in range(len(PROMPTS) + 1)]
    for index, answer in answers.items():
        assert answer.tokens.tolist() == session.language.greedy(PROMPTS[index], TOKENS)
        assert answer.hidden.dtype == np.float16
        assert answer.hidden.shape == (TOKENS, 64)
        states = [session.language.state([*PROMPTS[index], *answer.tokens[:position]]) for position in range(TOKENS)]
        assert answer.hidden[:, 0].tolist() == np.array(states, np.float16).tolist()


def test_an_end_of_sequence_token_is_part_of_the_answer(tmp_path: Path) -> None:
    eos = fake_session().language.greedy(PROMPTS[0], 5)[4]
    session = fake_session(eos_token_ids=(eos,), tree=chain(3))
    _distill(session, PROMPTS[:1], tmp_path / "data", max_new_tokens=TOKENS)
    answer = _answers(tmp_path / "data")[0]
    assert answer.tokens[-1] == eos and len(answer.tokens) <= 5
    assert len(answer.hidden) == len(answer.tokens)


class _InterruptedError(Exception):
    pass


def _interrupt_after(count: int) -> Any:
    def progress(done: int, total: int, tokens: int) -> None:
        if done == count:
            raise _InterruptedError

    return progress


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_data(tmp_path: Path, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "temperatures": (temperature,), "seed": 3}
    _distill(fake_session(2), PROMPTS, tmp_path / "whole", **options)
    session = fake_session(2)
    with pytest.raises(_InterruptedError):
        _distill(session, PROMPTS, tmp_path / "data", progress=_interrupt_after(5), **options)
    assert session.slots.free == 2
    kept = _answers(tmp_path / "data")
    assert len(kept) == 4, "whole shards of two are kept"
    again = fake_session(2)
    done: list[int] = []
    total = _distill(again, PROMPTS, tmp_path / "data", progress=lambda count, *rest: done.append(count), **options)
    assert done == [4, 5, 6, 7], "what was there is counted and not made again"
    assert total == TOKENS * len(PROMPTS)
    assert _same(_answers(tmp_path / "data"), _answers(tmp_path / "whole"))
    finished = fake_session(2)
    assert _distill(finished, PROMPTS, tmp_path / "data", **options) == total
    assert finished.executor.calls == 0


def test_a_shard_that_was_half_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".npz":
            raise _InterruptedError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(_InterruptedError):
            _distill(fake_session(), PROMPTS, tmp_path / "data", max_new_tokens=TOKENS)
    assert _answers(tmp_path / "data") == {}
    assert [path.suffix for path in (tmp_path / "data").iterdir() if path.name != DESCRIPTION] == [".partial"]
    _distill(fake_session(), PROMPTS, tmp_path / "data", max_new_tokens=TOKENS)
    assert sorted(_answers(tmp_path / "data")) == list(range(len(PROMPTS)))


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": PROMPTS[:-1]},
        {"prompts": [*PROMPTS[:-1], [9, 9]]},
        {"max_new_tokens": 13},
        {"temperatures": (0.5,)},
        {"temperatures": (0.0, 0.0)},
        {"seed": 1},
    ],
    ids=str,
)
def test_data_made_otherwise_is_not_mixed(tmp_path: Path, other: dict[str, Any]) -> None:
    settings = {"prompts": PROMPTS, "max_new_tokens": TOKENS, "temperatures": (0.0,), "seed": 0}
    _distill(fake_session(), output=tmp_path / "data", **settings)
    session = fake_session()
    with pytest.raises(TrainingError, match="other prompts, weights or settings") as caught:
        _distill(session, output=tmp_path / "data", **{**settings, **other})
    assert caught.value.hint
    assert session.executor.calls == 0
    assert len(_answers(tmp_path / "data")) == len(PROMPTS)


def test_a_damaged_description_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text('{"prompts')
    with pytest.raises(TrainingError, match="is not JSON"):
        _distill(fake_session(), PROMPTS, tmp_path, max_new_tokens=TOKENS)


def test_each_prompt_is_sampled_with_its_own_seed(tmp_path: Path) -> None:
    session: FakeSession = fake_session(3, tree=chain(3))
    _distill(session, [[5, 6]] * 3, tmp_path / "data", max_new_tokens=TOKENS, temperatures=(0.7,), seed=10)
    for index, answer in _answers(tmp_path / "data").items():
        params = SamplingParams(mode="sample", temperature=0.7, seed=10 + index)
        assert answer.tokens.tolist() == session.generate(token_ids=[5, 6], max_new_tokens=TOKENS, params=params).token_ids
    assert len({tuple(answer.tokens) for answer in _answers(tmp_path / "data").values()}) == 3


def test_each_prompt_is_answered_once_a_temperature(tmp_path: Path) -> None:
    session: FakeSession = fake_session(3, tree=chain(3))
    total = _distill(session, [[5, 6], [7]], tmp_path / "data", max_new_tokens=TOKENS, temperatures=(0.0, 0.7))
    answers = _answers(tmp_path / "data")
    assert total == 4 * TOKENS and sorted(answers) == [0, 1, 2, 3]
    for index, prompt in enumerate([[5, 6], [7]]):
        assert answers[index].tokens.tolist() == session.language.greedy(prompt, TOKENS)
        params = SamplingParams(mode="sample", temperature=0.7, seed=2 + index)
        sampled = session.generate(token_ids=prompt, max_new_tokens=TOKENS, params=params).token_ids
        assert answers[2 + index].tokens.tolist() == sampled
