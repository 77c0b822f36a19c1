"""200 schemas: whatever a model says under one is valid JSON of it, and drafting changes none of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medusa_deploy.runtime import Grammar, Rows, SamplingParams
from support.fake_executor import FakeSession, fake_session
from support.schemas import COUNT, fits, schemas
from support.trees import WIDE

pytest.importorskip("llguidance", reason="grammars need llguidance")

ROOM = 700


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> FakeSession:
    return fake_session(capacity=1000, text_folder=tmp_path_factory.mktemp("text"), eos_token_ids=(2,))


def _answers(session: FakeSession, schema: dict[str, Any], seed: int) -> None:
    """Answer plainly, on a tree and by the best rows; all must be equal and valid."""
    params = SamplingParams() if seed == 0 else SamplingParams(mode="sample", temperature=1.0, seed=seed)
    grammar = Grammar.json(schema)
    options: dict[str, Any] = {"max_new_tokens": ROOM, "params": params, "grammar": grammar}
    plain = session.generate(f"{seed}?", speculative=False, **options)
    assert plain.finish_reason == "stop", (schema, plain.text)
    assert fits(json.loads(plain.text), schema), (schema, plain.text)
    for way in (WIDE, Rows(8)):
        assert session.generate(f"{seed}?", drafting=way, **options).token_ids == plain.token_ids


def test_a_sample_of_the_suite(session: FakeSession) -> None:
    for number, schema in enumerate(schemas()[::5]):
        _answers(session, schema, number % 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_suite(session: FakeSession, seed: int) -> None:
    assert len({json.dumps(schema) for schema in schemas()}) > 0.9 * COUNT
    for schema in schemas():
        _answers(session, schema, seed)


def test_the_check_refuses_what_is_wrong() -> None:
    number = {"type": "integer", "maximum": 3}
    schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
    assert fits({"a": 3}, schema)
    for wrong in ({"a": 4}, {"a": True}, {}, {"a": 1, "b": 2}, []):
        assert not fits(wrong, schema)
