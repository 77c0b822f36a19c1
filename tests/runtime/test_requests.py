"""Requests: every way to be wrong is a named error that takes no slot, and what fits is generated to its end."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_deploy.runtime import DeployError, Request, SamplingParams, Tree, chain
from medusa_deploy.runtime.errors import CapacityError, PromptError, SamplingError, TreeError, UsageError
from support.fake_executor import fake_session
from support.tiny import VOCAB


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, PromptError, "no prompt"),
        ({"prompt": "a", "token_ids": [1]}, PromptError, "prompt.*token_ids"),
        ({"token_ids": [1], "messages": []}, PromptError, "messages.*token_ids"),
        ({"token_ids": []}, PromptError, "empty"),
        ({"token_ids": [1, VOCAB]}, PromptError, rf"0 … {VOCAB - 1}, got 1 … {VOCAB}"),
        ({"token_ids": [-1, 5]}, PromptError, "got -1"),
        ({"token_ids": [1.5]}, PromptError, "1.5"),
        ({"token_ids": ["1"]}, PromptError, "'1'"),
        ({"token_ids": "12"}, PromptError, "token_ids"),
        ({"token_ids": 12}, PromptError, "token_ids"),
        ({"prompt": "a"}, PromptError, "no tokenizer"),
        ({"messages": [{"role": "user", "content": "a"}]}, PromptError, "no tokenizer|no chat template"),
        ({"token_ids": [1], "stop": ("a",)}, PromptError, "no tokenizer"),
        ({"token_ids": [1], "max_new_tokens": 0}, UsageError, "max_new_tokens is 0"),
        ({"token_ids": [1], "max_new_tokens": -5}, UsageError, "max_new_tokens is -5"),
        ({"token_ids": [1], "max_new_tokens": 2.5}, UsageError, "max_new_tokens is 2.5"),
        ({"token_ids": [1] * 257, "max_new_tokens": 1}, CapacityError, "257 prompt tokens .* capacity of 256"),
        ({"token_ids": [1] * 200, "max_new_tokens": 57}, CapacityError, "200 prompt tokens . 57 new tokens"),
        ({"token_ids": [1], "tree": chain(4)}, TreeError, "4 deep, and there are 3 heads"),
        ({"token_ids": [1], "tree": Tree.from_choices([(4,)])}, TreeError, "rank"),
        (
            {"token_ids": [1], "tree": Tree.from_choices([(a, *b) for a in range(4) for b in [(), (0,), (1,), (2,)]])},
            CapacityError,
            "17 rows",
        ),
        ({"token_ids": [1], "params": SamplingParams(temperature=-1, mode="sample")}, SamplingError, "temperature"),
        ({"token_ids": [1], "params": SamplingParams(logit_bias={VOCAB: 1.0})}, SamplingError, "logit_bias"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else str(value)[:60],
)
def test_a_wrong_request_is_a_named_error_and_takes_no_slot(options: dict[str, Any], error: type[DeployError], said: str) -> None:
    session = fake_session()
    with pytest.raises(error, match=said) as caught:
        session.generate(**options)
    assert caught.value.hint
    with pytest.raises(error, match=said):
        list(session.stream(**options))
    with pytest.raises(error, match=said):  # keywords that exclude each other are refused before there is a request
        ((_, refused),) = session.generate_many([Request(**options)])
        assert (refused.finish_reason, refused.token_ids) == ("error", [])
        assert refused.error is not None
        raise refused.error
    assert session.slots.free == 1
    assert session.executor.calls == 0


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    for call in (fake_session().generate, fake_session().stream):
        with pytest.raises(UsageError, match="unknown option max_tokens") as caught:
            call(token_ids=[1], max_tokens=5)
        assert "max_new_tokens" in caught.value.hint


@pytest.mark.parametrize("tree", [None, chain(3), Tree.from_choices([(rank,) for rank in range(4)])])
@pytest.mark.parametrize("prompt", [1, 100, 255])
def test_a_slot_fills_to_its_capacity_and_no_further(prompt: int, tree: Tree | None) -> None:
    session = fake_session()
    ids = list(range(100, 100 + 20)) * 13
    generation = session.generate(token_ids=ids[:prompt], max_new_tokens=256 - prompt, tree=tree)
    assert generation.token_ids == session.language.greedy(ids[:prompt], 256 - prompt)
    assert len(generation.token_ids) == 256 - prompt
    assert generation.finish_reason == "length"
    with pytest.raises(CapacityError):
        session.generate(token_ids=ids[:prompt], max_new_tokens=257 - prompt, tree=tree)


def test_a_request_says_how_many_rows_a_step_has() -> None:
    session = fake_session(tree=chain(2))
    typical = {"params": SamplingParams(mode="typical")}  # its text depends on the rows: as many as the bundle's tree has
    stats = [
        session.generate(token_ids=[1], max_new_tokens=9, **options).stats
        for options in (typical, {"tree": chain(1)}, {"speculative": False}, {"speculative": False, "tree": chain(1)})
    ]
    assert [stat.rows // stat.steps for stat in stats] == [3, 2, 1, 1]


def test_without_a_seed_every_request_is_another() -> None:
    session = fake_session()
    params = SamplingParams(mode="sample")
    answers = [session.generate(token_ids=[1, 2], max_new_tokens=30, params=params).token_ids for _ in range(3)]
    assert answers[0] != answers[1] != answers[2] != answers[0]
