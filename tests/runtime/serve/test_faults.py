"""What angers users of other servers, each as a test of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime.executors.step_plan import StepPlan, StepResult
from medusa_deploy.runtime.serve.limits import read_keys
from support.fake_executor import FakeSession, fake_session
from support.server import Running, drafting, serving
from support.text import SPECIAL, decode, encode


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def server(text_folder: Path) -> Iterator[Running]:
    with serving(drafting(fake_session(2, text_folder=text_folder))) as running:
        yield running


def slow(session: FakeSession, seconds: float = 0.02) -> threading.Event:
    """Let each engine call take ``seconds``; the event, once set, makes them fast again."""
    run, fast = session.executor.run, threading.Event()

    def slowly(plan: StepPlan) -> StepResult:
        fast.wait(seconds)
        return run(plan)

    session.executor.run = slowly  # type: ignore[method-assign]
    return fast


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it doesn't happen"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and response.headers["x-request-id"]
    return body["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("stream", [True, False])
def test_1_a_client_that_leaves_ends_its_generation(text_folder: Path, stream: bool) -> None:
    session = fake_session(1, text_folder=text_folder)
    fast = slow(session)
    with serving(session) as server:
        body = {"prompt": "ab", "max_tokens": 240, "stream": stream, "ignore_eos": True}
        with httpx.Client(base_url=server.url) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.3)
        until(lambda: session.slots.free == 1)
        assert session.executor.calls < 150
        fast.set()
        assert server.complete(max_tokens=3).status_code == 200
        assert 'medusa_request_success_total{finished_reason="abort"} 1.0' in server.http.get("/metrics").text


def split_characters(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes: ASCII letters, and the halves of characters of two bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(0x3F, 0x7B)]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    halves = [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in [0xC3, *range(0x80, 0xC0)]]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters, *halves])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_2_streams_hold_whole_characters(tmp_path: Path) -> None:
    session = drafting(fake_session(2, text_folder=tmp_path))
    split_characters(tmp_path)
    with serving(session) as server:
        for seed in range(6):
            body = {"max_tokens": 120, "temperature": 1, "seed": seed, "return_token_ids": True}
            choice = server.complete("ab", **body).json()["choices"][0]
            stream = events(server.complete("ab", **body, stream=True))
            assert choice["text"] == session.codec.decode(choice["token_ids"]) and "Ã" not in choice["text"]
            assert "".join(event["choices"][0]["text"] for event in stream) == choice["text"]
            spelt = b"".join(session.codec.token_bytes(token) for token in choice["token_ids"] if token >= len(SPECIAL))
            assert spelt.decode("utf-8", "replace") == choice["text"]


@pytest.mark.parametrize("place", range(3, 20, 2))
def test_3_and_4_a_stop_string_cuts_text_ids_log_probabilities_and_usage_at_one_token(server: Running, place: int) -> None:
    assert isinstance(server.session, FakeSession)
    ids = server.session.language.greedy(encode("ab"), 40)
    stop = decode(ids)[place : place + 2]
    end = decode(ids).index(stop)
    body = {"max_tokens": 40, "temperature": 0, "stop": [stop], "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    found = server.complete("ab", **body).json()
    choice, count = found["choices"][0], found["usage"]["completion_tokens"]
    assert choice["text"] == decode(ids)[:end] and choice["finish_reason"] == "stop"
    assert choice["token_ids"] == ids[:count] and decode(ids[:count]) == choice["text"] + stop
    assert len(choice["logprobs"]["tokens"]) == count
    stream = events(server.complete("ab", **body, stream=True, stream_options={"include_usage": True}))
    assert stream[-1]["usage"] == found["usage"]
    pieces = [event["choices"][0] for event in stream[:-1]]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert max(len(piece["token_ids"]) for piece in pieces) > 1 or place < 5  # the stop string lay inside an accepted run
    assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
    assert [value for piece in pieces for value in piece["logprobs"]["token_logprobs"]] == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("stream", [True, False])
def test_5_a_prompt_that_is_too_long_is_refused(server: Running, stream: bool) -> None:
    assert error(server.complete("a" * 300, stream=stream), 400)["code"] == "context_length_exceeded"
    refused = error(server.complete("a" * 200, max_tokens=100, stream=stream), 400)
    assert refused["code"] == "context_length_exceeded" and refused["param"] == "max_tokens" and "256" in refused["message"]
    assert server.chat(max_tokens=1, messages=[{"role": "user", "content": "a" * 200}]).status_code == 200
    assert server.complete("a" * 250, temperature=0).json()["usage"]["completion_tokens"] <= 6


@pytest.mark.parametrize("stream", [True, False])
def test_6_a_template_that_fails_is_refused_with_its_own_message(text_folder: Path, stream: bool, tmp_path: Path) -> None:
    session = fake_session(1, text_folder=tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}", "utf-8")
    with serving(session) as server:
        refused = error(server.chat(stream=stream), 400)
        assert "roles must alternate" in refused["message"] and refused["param"] == "messages"


def test_7_streams_end_with_one_usage(server: Running) -> None:
    plain = events(server.chat(max_tokens=9, stream=True, temperature=0))
    assert all("usage" not in event for event in plain)
    for n in (1, 2):
        found = events(server.chat(max_tokens=9, stream=True, stream_options={"include_usage": True}, n=n, temperature=0))
        assert [event["usage"] for event in found[:-1]] == [None] * (len(found) - 1) and found[-1]["choices"] == []
        assert found[-1]["usage"] == server.chat(max_tokens=9, n=n, temperature=0).json()["usage"]
        assert len({event["id"] for event in found}) == 1


def test_8_an_engine_that_hangs_is_seen(text_folder: Path) -> None:
    session = fake_session(1, text_folder=text_folder)
    with serving(session, stall_seconds=0.3) as server:
        assert server.complete(max_tokens=2).status_code == 200
        time.sleep(0.4)
        assert server.http.get("/health/ready").status_code == 200  # idle isn't hanging
        fast = slow(session, 60)
        asking = threading.Thread(target=lambda: server.complete(max_tokens=2), daemon=True)
        asking.start()
        until(lambda: server.http.get("/health/ready").json() == {"status": "stalled"})
        assert server.http.get("/health/ready").status_code == 503 and server.http.get("/health").status_code == 503
        fast.set()
        asking.join(20)
        until(lambda: server.http.get("/health").status_code == 200)


def test_an_engine_that_fails_ends_its_own_requests_and_says_so(text_folder: Path) -> None:
    session = fake_session(1, text_folder=text_folder)
    with serving(session) as server:
        session.executor.fail_at = session.executor.calls + 4
        stream = events(server.complete(max_tokens=30, temperature=0, stream=True, ignore_eos=True))
        assert stream[-1]["error"]["code"] == "StepError" and stream[0]["choices"][0]["text"]
        session.executor.fail_at = session.executor.calls + 4
        assert error(server.complete(max_tokens=30, temperature=0, ignore_eos=True), 500)["code"] == "StepError"
        assert server.complete(max_tokens=30).status_code == 200


def test_9_and_10_overload_is_answered_and_health_stays(text_folder: Path) -> None:
    session = fake_session(1, text_folder=text_folder)
    fast = slow(session, 10)
    with serving(session, max_waiting=2) as server:

        async def work() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"prompt": "ab", "max_tokens": 20, "temperature": 0}
                asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(12)]
                while sum(task.done() for task in asked) < 9:
                    assert (await client.get("/health/ready")).status_code == 200
                    await asyncio.sleep(0.01)
                assert "medusa_num_requests_running 1.0" in (await client.get("/metrics")).text
                fast.set()
                return list(await asyncio.gather(*asked))

        answers = asyncio.run(asyncio.wait_for(work(), 60))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 9 and {error(answer, 429)["code"] for answer in refused} == {"queue_full"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        until(lambda: session.slots.free == 1)
        assert server.complete(max_tokens=2).status_code == 200


def test_12_known_fields_that_cannot_be_honoured_are_refused(server: Running) -> None:
    for name, value in {
        "response_format": {"type": "xml"}, "tools": [{"type": "function"}], "tool_choice": "required", "suffix": "x",
        "echo": True, "grammar": "root ::= x", "logprobs": 99, "best_of": 3, "top_logprobs": 3, "chat_template_kwargs": {"a": 1},
    }.items():  # fmt: skip
        send = server.chat if name in ("top_logprobs", "chat_template_kwargs", "tools", "tool_choice") else server.complete
        assert error(send(**{name: value}), 400)["param"] == name
    for name, value in {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "suffix": None}.items():
        assert server.chat(max_tokens=1, **{name: value}).status_code == 200


def test_13_conversations_do_not_mix(server: Running) -> None:
    assert isinstance(server.session, FakeSession)
    for text in ("abc", "abd", "abc", "ab"):
        found = server.complete(text, max_tokens=12, temperature=0, ignore_eos=True).json()
        assert found["choices"][0]["text"] == decode(server.session.language.greedy(encode(text), 12))


def test_13_a_cache_is_shared_by_equal_salts_and_keys_alone(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\nother\n", "utf-8")
    prompt = "a long prompt " * 8
    with serving(fake_session(1, text_folder=text_folder), keys=read_keys(tmp_path / "keys")) as server:

        def cached(key: str, **body: Any) -> int:
            server.http.headers["Authorization"] = f"Bearer {key}"
            usage = server.complete(prompt, max_tokens=4, temperature=0, **body).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached("one") == 0 and cached("one") > 0
        assert cached("other") == 0 and cached("other") > 0
        assert cached("one", cache_salt="x") == 0 and cached("one", cache_salt="x") > 0
        assert cached("other", cache_salt="x") == 0
        assert "medusa_prefix_cache_hits_total 0.0" not in server.http.get("/metrics").text


def test_14_unknown_fields_are_accepted_and_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "medusa_deploy.serve"):
        assert server.complete("secret", max_tokens=1, colour="blue", user="u").status_code == 200
    until(lambda: any("unknown_fields" in getattr(record, "fields", {}) for record in caplog.records))
    lines = [record.fields for record in caplog.records if "unknown_fields" in getattr(record, "fields", {})]
    assert lines[0]["unknown_fields"] == ["colour"] and "secret" not in str(lines) and "blue" not in str(lines)
    assert lines[0]["prompt_tokens"] == 6 and lines[0]["finish_reasons"] == ["length"] and lines[0]["request_id"]


def test_15_batch_mates_change_no_text(server: Running) -> None:
    alone = server.complete("ab", max_tokens=30, seed=3, temperature=1.3).json()["choices"][0]["text"]

    async def work() -> set[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [{"prompt": "ab", "max_tokens": 30, "seed": 3, "temperature": 1.3}, {"prompt": "xyz", "max_tokens": 25}] * 6
            found = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return {each.json()["choices"][0]["text"] for each in found[::2]}

    assert asyncio.run(work()) == {alone}
