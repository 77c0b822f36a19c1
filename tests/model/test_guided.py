"""Grammars on real weights with a real tokenizer: valid answers, equal with and without drafts, and calls of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medusa_deploy.runtime import Grammar, Request, Rows, SamplingParams, Session, load
from medusa_deploy.runtime.text.template import ChatTemplate
from medusa_deploy.runtime.text.tool_calls import CallForm, CallReader
from support.schemas import fits, schemas

pytestmark = pytest.mark.model
pytest.importorskip("llguidance", reason="grammars need llguidance")

UNICODE = {
    "type": "object",
    "properties": {
        "größe": {"enum": ["klein", "groß", "日本語", "😀😃"]},
        "naïve": {"type": "string", "pattern": "^[à-ÿ]{1,3}$"},
    },
    "required": ["größe", "naïve"],
    "additionalProperties": False,
}
TOOL = {
    "name": "get_weather",
    "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False,
    },
}  # fmt: skip
CHATML = (
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    'Answer with <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def _messages(schema: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Answer in JSON of the schema {json.dumps(schema, ensure_ascii=False)}"}]


def _all_ways(session: Session, schema: dict[str, Any], params: SamplingParams) -> bool:
    """Whether the model ended the answer. Every way gives the plain answer, and one that ended fits the schema."""
    options: dict[str, Any] = {"max_new_tokens": 400, "params": params, "grammar": Grammar.json(schema)}
    plain = session.generate(messages=_messages(schema), speculative=False, **options)
    ended = plain.finish_reason == "stop"
    assert not ended or fits(json.loads(plain.text), schema), (schema, plain.text)
    for way in ({}, {"rows": 8}):
        assert session.generate(messages=_messages(schema), **way, **options).token_ids == plain.token_ids, schema
    return ended


@pytest.mark.parametrize("seed", range(3))
def test_schemas_of_the_suite(smollm2: Session, seed: int) -> None:
    params = SamplingParams() if seed == 0 else SamplingParams(mode="sample", temperature=1.0, seed=seed)
    ended = [_all_ways(smollm2, schema, params) for schema in schemas()[seed::25]]
    assert 2 * sum(ended) >= len(ended), "a small model goes on with lists and texts that need no end, but not always"


def test_unicode(smollm2: Session) -> None:
    for seed in range(4):
        assert _all_ways(smollm2, UNICODE, SamplingParams(mode="sample", temperature=1.5, seed=seed))


def test_slots_with_and_without_grammars(smollm2: Session, smollm2_bundle: Any) -> None:
    asked = [(_messages(schema), Grammar.json(schema)) for schema in schemas()[2:5]] + [(_messages({}), None)]
    requests = [Request(messages=messages, max_new_tokens=40, grammar=grammar) for messages, grammar in asked]
    together = dict(load(smollm2_bundle, slots=3, check_hashes=False).generate_many(requests))
    for index, request in enumerate(requests):
        assert together[index].token_ids == smollm2.submit(request).result().token_ids


def test_a_tool_is_called(smollm2: Session) -> None:
    template = ChatTemplate(CHATML, smollm2.manifest.text.special_tokens)
    shown = [{"type": "function", "function": TOOL}]
    prompt = template.render([{"role": "user", "content": "What is the weather in Paris?"}], shown)
    grammar = CallForm().grammar([TOOL], several=True, text=False)
    for way in ({"speculative": False}, {"rows": 8}):
        answer = smollm2.generate(prompt, max_new_tokens=80, grammar=grammar, **way)
        _, (call, *_) = CallReader().push(answer.text)
        assert call.name == "get_weather" and "city" in json.loads(call.arguments)


def test_forced_tokens_raise_acceptance(smollm2: Session) -> None:
    names = ["temperature_in_degrees", "wind_speed"]
    properties = {name: {"type": "integer", "maximum": 99, "minimum": 0} for name in names}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    options: dict[str, Any] = {"messages": _messages(schema), "max_new_tokens": 60, "rows": Rows(8).count}
    answer = smollm2.generate(grammar=Grammar.json(schema), **options)
    assert answer.stats.mean_acceptance_length > 3
