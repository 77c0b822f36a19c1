"""Answers through transformers: the tokens of its own greedy decoding, prompt by prompt, and the states behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from medusa_deploy.calibration.answers.answers import Question  # noqa: E402
from medusa_deploy.calibration.answers.torch_answerer import TorchAnswerer  # noqa: E402
from medusa_deploy.export.backbone.backbone import load_module  # noqa: E402
from support.tiny import VOCAB, make_tiny_model  # noqa: E402

TOKENS = 12


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_module(make_tiny_model(tmp_path_factory.mktemp("model")), "fp32")


def _greedy(module: Any, prompt: list[int], eos: tuple[int, ...] = ()) -> tuple[list[int], np.ndarray]:
    tokens, states = list(prompt), []
    for _ in range(TOKENS):
        with torch.no_grad():
            state = module.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        states.append(state.numpy())
        tokens.append(int(module.get_output_embeddings()(state).argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :], np.stack(states)


@pytest.mark.parametrize("slots", [2, 8])
def test_greedy_answers_are_those_of_each_prompt_alone(module: Any, slots: int) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (5, 1, 9, 3, 3)]
    eos = (_greedy(module, prompts[2])[0][4],)
    answerer = TorchAnswerer(module, "digest", eos, slots, "cpu")
    found = {answer.question: answer for answer in answerer.answer([Question(prompt) for prompt in prompts], TOKENS)}
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert len(found[2].tokens) <= 5 and found[2].tokens[-1] in eos
    for index, prompt in enumerate(prompts):
        tokens, states = _greedy(module, prompt, eos)
        assert found[index].tokens.tolist() == tokens
        assert found[index].hidden.dtype == np.float16
        np.testing.assert_allclose(found[index].hidden, states, atol=2e-2)


def test_bfloat16_answers_nearly_so_and_says_so(tmp_path: Path) -> None:
    exact = load_module(make_tiny_model(tmp_path), "fp32")
    rounded = TorchAnswerer(load_module(tmp_path, "fp32"), "digest", (), 4, "cpu", bfloat16=True)
    assert rounded.weights == "digest bfloat16"
    prompt = [5, 6, 7, 8]
    (answer,) = rounded.answer([Question(prompt)], TOKENS)
    rows = torch.tensor([[*prompt, *answer.tokens[:-1].tolist()]])
    with torch.no_grad():
        states = exact.base_model(input_ids=rows).last_hidden_state[0, len(prompt) - 1 :].numpy()
    assert answer.hidden.dtype == np.float16
    assert 0 < np.abs(answer.hidden - states).max() < 0.1 * np.abs(states).max()


def test_sampled_answers_vary_and_repeat_with_their_seed(module: Any) -> None:
    answerer = TorchAnswerer(module, "digest", (), 16, "cpu")
    questions = [Question([5, 6, 7], 1.0, seed=3 + index) for index in range(16)]

    def answers(seed: int) -> list[list[int]]:
        asked = [Question(question.prompt, question.temperature, question.seed + seed) for question in questions]
        return [answer.tokens.tolist() for answer in answerer.answer(asked, TOKENS)]

    assert answers(0) == answers(0) != answers(1)
    assert len({tuple(tokens) for tokens in answers(0)}) > 8


def test_greedy_and_sampled_questions_go_together(module: Any) -> None:
    answerer = TorchAnswerer(module, "digest", (), 4, "cpu")
    prompt = [9, 8]
    found = list(answerer.answer([Question(prompt, 1.0), Question(prompt), Question(prompt, 1.0)], TOKENS))
    assert {answer.question for answer in found} == {0, 1, 2}
    assert next(answer for answer in found if answer.question == 1).tokens.tolist() == _greedy(module, prompt)[0]


def test_nothing_asked_is_nothing_answered(module: Any, tmp_path: Path) -> None:
    assert list(TorchAnswerer(module, "digest", (), 4, "cpu").answer([], TOKENS)) == []
