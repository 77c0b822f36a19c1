"""OpenAI's own client works unmodified: sync and async, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from support.documents import ROOT, blocks  # noqa: E402
from support.fake_executor import FakeSession, fake_session  # noqa: E402
from support.server import Running, serving  # noqa: E402
from support.text import decode, encode  # noqa: E402

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PROMPT = encode("user:hello;>")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> FakeSession:
    return fake_session(3, text_folder=tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def server(session: FakeSession) -> Iterator[Running]:
    with serving(session) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def wanted(session: FakeSession, count: int) -> str:
    return decode(session.language.greedy(PROMPT, count))


def test_a_chat(client: Any, session: FakeSession) -> None:
    found = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=20, temperature=0)
    assert found.choices[0].message.content == wanted(session, 20) and found.choices[0].finish_reason == "length"
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT), "completion_tokens": 20, "total_tokens": len(PROMPT) + 20,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert found.object == "chat.completion" and found.model == "tiny" and found.choices[0].message.role == "assistant"


def test_a_streamed_chat_with_usage_and_log_probabilities(client: Any, session: FakeSession) -> None:
    events = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=20, temperature=0, stream=True, logprobs=True, top_logprobs=2,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert events[0].choices[0].delta.role == "assistant" and events[0].choices[0].delta.content == ""
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == wanted(session, 20)
    assert events[-2].choices[0].finish_reason == "length" and events[-1].choices == []
    assert events[-1].usage.completion_tokens == 20 and all(event.usage is None for event in events[:-1])
    entries = [entry for event in events[:-1] for entry in (event.choices[0].logprobs.content or [])]
    assert "".join(entry.token for entry in entries if not entry.token.startswith("<")) == wanted(session, 20)
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob for entry in entries)


def test_completions_of_text_and_ids(client: Any, session: FakeSession) -> None:
    found = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=9, temperature=0, logprobs=1)
    assert [choice.text for choice in found.choices] == [decode(session.language.greedy(encode(p), 9)) for p in ("ab", "cd")]
    assert len(found.choices[0].logprobs.token_logprobs) == 9 and found.choices[0].logprobs.text_offset[0] == 0
    ids = client.completions.create(model="tiny", prompt=encode("ab"), temperature=0)
    assert ids.usage.completion_tokens == 16 and ids.choices[0].text.startswith(found.choices[0].text)
    streamed = client.completions.create(model="tiny", prompt="ab", max_tokens=9, temperature=0, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == found.choices[0].text


def test_several_answers_with_a_seed(client: Any) -> None:
    def ask(**more: Any) -> list[str]:
        found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, seed=7, temperature=1.5, **more)
        assert found.usage.prompt_tokens == len(PROMPT) and found.usage.completion_tokens == 12 * len(found.choices)
        return [choice.message.content for choice in found.choices]

    three = ask(n=3)
    assert len(set(three)) == 3 and ask(n=3) == three and ask() == three[:1]
    events = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, seed=7, temperature=1.5, n=3, stream=True
    )
    texts = ["", "", ""]
    for event in events:
        texts[event.choices[0].index] += event.choices[0].delta.content or ""
    assert texts == three


def test_the_async_client(server: Running, session: FakeSession) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            ask: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0}
            found = await asyncio.gather(*(client.chat.completions.create(**ask) for _ in range(8)))
            assert {each.choices[0].message.content for each in found} == {wanted(session, 20)}
            stream = await client.chat.completions.create(**ask, stream=True)
            assert "".join([event.choices[0].delta.content or "" async for event in stream]) == wanted(session, 20)

    asyncio.run(asyncio.wait_for(work(), 60))


def test_the_example_of_the_documentation(session: FakeSession, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks(ROOT / "docs" / "serving.md", "python")
    with serving(session, name="my-bundle") as running:
        exec(example.replace("http://127.0.0.1:8000", running.url), {})  # noqa: S102
    assert capsys.readouterr().out


def test_models_and_errors(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="isn't served"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found" and caught.value.param == "model" and caught.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, prediction={"type": "content", "content": "x"})
    assert refused.value.param == "prediction" and refused.value.code == "unsupported_parameter"
