"""Answers of a form and calls of tools over HTTP: OpenAI's shapes, streams, and refusals before a stream opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("llguidance", reason="grammars need llguidance")
openai = pytest.importorskip("openai")

from support.fake_executor import fake_session  # noqa: E402
from support.server import Running, drafting, serving  # noqa: E402

WITH_TOOLS = (
    "{% if tools %}tools:{% for tool in tools %}{{ tool | tojson }};{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %};{% endfor %}>"
)
ASK: list[Any] = [{"role": "user", "content": "weather?"}]
LETTERS = {"type": "string", "pattern": "^[a-z]{2,4}$"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
            "additionalProperties": False, "$defs": {"city": LETTERS},
        },
    },
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SCHEMA = {
    "type": "object",
    "properties": {"city": LETTERS, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("text")
    session = fake_session(3, capacity=1000, text_folder=folder, eos_token_ids=(2,))
    (folder / "chat_template.jinja").write_text(WITH_TOOLS, "utf-8")
    with serving(drafting(session, rows=8)) as running:
        yield running


@pytest.fixture(scope="module")
def without_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(fake_session(1, text_folder=tmp_path_factory.mktemp("text"), eos_token_ids=(2,))) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_a_schema_is_kept_to(client: Any, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "messages": ASK, "response_format": FORMAT, "temperature": temperature, "seed": 5, "max_tokens": 300,
    }  # fmt: skip
    answer = client.chat.completions.create(n=2, **options)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert list(found) == ["city", "warm"] and isinstance(found["warm"], bool) and 2 <= len(found["city"]) <= 4
        assert choice.finish_reason == "stop"
    streamed = "".join(each.choices[0].delta.content or "" for each in client.chat.completions.create(stream=True, **options))
    assert streamed == answer.choices[0].message.content


def test_other_forms(server: Running) -> None:
    def said(**form: Any) -> str:
        response = server.complete("ab", max_tokens=200, temperature=1, seed=1, **form)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    assert said(structured_outputs={"choice": ["one", "two"]}) in ("one", "two")
    assert said(guided_choice=["uno"]) == "uno"
    assert said(structured_outputs={"regex": "[0-9]{4}"}).isdigit() and len(said(guided_regex="[0-9]{4}")) == 4
    assert said(structured_outputs={"grammar": 'start: "x" | "y"'}) in "xy" and said(guided_grammar='start: "x"') == "x"
    assert isinstance(json.loads(said(structured_outputs={"json": SCHEMA}))["warm"], bool)
    assert json.loads(said(guided_json=json.dumps(SCHEMA)))["city"]
    assert said(response_format={"type": "json_object"}).startswith("{")
    assert said(response_format={"type": "text"})


@pytest.mark.parametrize("form", [
    {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
    {"structured_outputs": {"json": SCHEMA, "regex": "x"}}, {"structured_outputs": {"structural_tag": "x"}},
    {"structured_outputs": {}}, {"guided_regex": "(a"}, {"guided_regex": ""}, {"guided_choice": []},
    {"guided_grammar": "start: x"},
], ids=str)  # fmt: skip
def test_what_is_no_form_is_refused_before_the_stream_opens(server: Running, form: dict[str, Any]) -> None:
    for stream in (False, True):
        assert error(server.chat(stream=stream, max_tokens=5, **form))["param"] == next(iter(form))


def test_two_forms_are_refused(server: Running) -> None:
    assert "different forms" in error(server.complete("a", guided_regex="x", response_format={"type": "json_object"}))["message"]
    assert error(server.chat(tools=[CLOCK], response_format=FORMAT))["param"] == "response_format"


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_call_that_must_be(client: Any, choice: Any, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": choice, "temperature": temperature, "seed": 3,
        "max_tokens": 300,
    }  # fmt: skip
    (answer,) = client.chat.completions.create(**options).choices
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    given = json.loads(call.function.arguments)
    assert given == {} if call.function.name == "clock" else 2 <= len(given["city"]) <= 4
    if choice != "required":
        assert call.function.name == "get_weather"
    events = list(client.chat.completions.create(stream=True, **options))
    said = [each for event in events for each in event.choices[0].delta.tool_calls or []]
    assert [(each.index, each.function.name, each.function.arguments) for each in said] == [
        (0, call.function.name, call.function.arguments)
    ]
    assert not any(event.choices[0].delta.content for event in events)
    assert events[-1].choices[0].finish_reason == "tool_calls"


def test_calls_and_their_results_go_on(server: Running) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "oslo"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
    ]
    body = {"messages": messages, "tools": [WEATHER], "max_tokens": 4}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    expected = server.session
    assert expected is not None
    text = 'assistant:<tool_call>{"name": "get_weather", "arguments": {"city": "oslo"}}</tool_call>;tool:cold;>'
    ids = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert expected.codec.decode(ids).endswith(text)
    called["function"]["arguments"] = "no JSON"  # type: ignore[index]
    assert error(server.http.post("/v1/chat/completions", json={**body, "messages": messages}))["param"] == "messages[1]"


def test_auto_and_none(server: Running) -> None:
    free = server.chat(tools=[CLOCK], max_tokens=8, temperature=0).json()["choices"][0]
    assert free["finish_reason"] == "length" and free["message"]["content"] and "tool_calls" not in free["message"]
    without = server.chat(max_tokens=8, temperature=0).json()
    none = server.chat(tools=[CLOCK], tool_choice="none", max_tokens=8, temperature=0).json()
    assert none["choices"][0]["message"] == without["choices"][0]["message"]
    assert none["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]


def test_a_strict_tool_is_called_rightly_or_not_at_all(server: Running) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    bias = {str(server.session.codec.encode("<")[0]): 60}  # type: ignore[union-attr]
    for _ in range(3):
        choice = server.chat(tools=[strict], max_tokens=200, temperature=1, logit_bias=bias).json()["choices"][0]
        for call in choice["message"].get("tool_calls", []):
            assert 2 <= len(json.loads(call["function"]["arguments"])["city"]) <= 4


@pytest.mark.parametrize("body", [
    {"tools": [{"type": "web_search"}]}, {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"tools": [CLOCK, CLOCK]},
    {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
    {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]},
    {"tool_choice": "required"}, {"tool_choice": "any", "tools": [CLOCK]},
    {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [CLOCK]},
    {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "text"}}}], "tool_choice": "required"},
], ids=["other", "name", "twice", "parameters", "many", "none", "any", "unknown", "schema"])  # fmt: skip
def test_tools_that_cannot_be_used(server: Running, body: dict[str, Any]) -> None:
    for stream in (False, True):
        assert error(server.chat(stream=stream, **body))["param"] in body


def test_a_template_that_takes_no_tools_is_a_400_that_says_so(without_tools: Running) -> None:
    found = error(without_tools.chat(tools=[CLOCK], stream=True))
    assert found["param"] == "tools" and "takes no tools" in found["message"]
    assert error(without_tools.complete("x", tools=[CLOCK]))["param"] == "tools"


def test_a_stop_parameter_is_named_by_its_error(server: Running) -> None:
    assert error(server.complete("a", stop=[""]))["param"] == "stop"
    assert error(server.complete("stop is", max_tokens=3, guided_regex="(stop is"))["param"] == "guided_regex"
