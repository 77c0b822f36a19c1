"""Who may ask, for how much, and what a server says of itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("starlette")

from medusa_deploy import __version__
from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.serve.limits import read_keys
from medusa_deploy.runtime.serve.server import bind
from support.fake_executor import fake_session
from support.server import Running, drafting, serving
from support.text import encode

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def server(text_folder: Path) -> Iterator[Running]:
    with serving(fake_session(2, text_folder=text_folder), max_body_bytes=4000, body_seconds=0.3, max_tokens=100) as running:
        yield running


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_keys_are_asked_for_where_there_are_some(text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\nfirst-key\nsecond-key\n", "utf-8")
    with serving(fake_session(1, text_folder=text_folder), keys=read_keys(tmp_path / "keys")) as server:
        for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic first-key"}):
            refused = server.http.post("/v1/completions", json={"prompt": "a"}, headers=wrong)
            assert refusal(refused) == (401, "invalid_api_key") and refused.headers["www-authenticate"] == "Bearer"
            assert server.http.get("/v1/models", headers=wrong).status_code == 401
            assert server.http.post("/tokenize", json={"prompt": "a"}, headers=wrong).status_code == 401
        for key in ("first-key", "second-key"):
            assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/health/ready", "/metrics", "/version", "/"):
            assert server.http.get(path).status_code == 200


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none\n", "utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(UsageError, match="API key"):
            read_keys(tmp_path / name)


def test_an_address_that_is_taken_is_refused() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="can't listen"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_server_that_loads_says_so() -> None:
    with serving(None) as server:
        for response in (server.chat(), server.http.get("/v1/models"), server.http.post("/tokenize", json={})):
            assert refusal(response) == (503, "service_unavailable") and response.headers["retry-after"] == "1"
        assert server.http.get("/health").json() == {"status": "loading"} and server.http.get("/metrics").status_code == 200
        assert server.http.get("/health/ready").status_code == 503


def test_limits_of_bodies_tokens_and_stops(server: Running) -> None:
    assert refusal(server.complete("a" * 4001)) == (413, "body_too_large")
    body = (part for part in [b'{"prompt": "', b"a" * 5000, b'"}'])
    chunked = server.http.post("/v1/completions", content=body, headers=JSON)
    assert refusal(chunked) == (413, "body_too_large")
    form = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert refusal(form) == (415, "unsupported_media_type")

    def late() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)
        yield b"}"

    slowly = server.http.post("/v1/completions", content=late(), headers=JSON)
    assert refusal(slowly) == (408, "body_timeout")
    assert refusal(server.complete(max_tokens=101)) == (400, "invalid_value")
    assert refusal(server.complete(stop=["a"] * 17)) == refusal(server.complete(stop=[""])) == (400, "invalid_value")
    assert refusal(server.complete(n=3)) == refusal(server.complete(prompt=[])) == (400, "invalid_value")
    assert server.chat().json()["usage"]["completion_tokens"] <= 100


def test_too_many_requests_at_a_time(text_folder: Path) -> None:
    session = fake_session(1, text_folder=text_folder)
    run = session.executor.run
    session.executor.run = lambda plan: (time.sleep(0.02), run(plan))[1]  # type: ignore[method-assign]
    body = {"prompt": "ab", "stream": True, "max_tokens": 250, "ignore_eos": True}
    with serving(session, max_concurrency=1) as server:
        with httpx.Client(base_url=server.url) as other, other.stream("POST", "/v1/completions", json=body):
            refused = server.http.get("/v1/models")
            assert refusal(refused) == (429, "too_many_requests") and refused.headers["retry-after"] == "1"
            assert server.http.get("/health").status_code == 200
        end = time.monotonic() + 20
        while server.http.get("/v1/models").status_code != 200:
            assert time.monotonic() < end


def test_a_deadline_ends_a_request(text_folder: Path) -> None:
    session = fake_session(1, text_folder=text_folder)
    run = session.executor.run
    session.executor.run = lambda plan: (time.sleep(0.05), run(plan))[1]  # type: ignore[method-assign]
    with serving(session) as server:
        found = server.complete(max_tokens=200, deadline=0.5, ignore_eos=True).json()
        assert found["choices"][0]["finish_reason"] == "cancelled" and 0 < found["usage"]["completion_tokens"] < 200
        assert refusal(server.complete(max_tokens=200, deadline=1e-5)) == (408, "deadline_exceeded")
        assert refusal(server.complete(deadline=0)) == (400, "invalid_value")


def test_tokens_and_text(server: Running) -> None:
    def post(path: str, **body: Any) -> Any:
        return server.http.post(path, json=body).json()

    assert post("/tokenize", prompt="ab") == {"count": 2, "max_model_len": 256, "tokens": encode("ab")}
    assert post("/tokenize", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}])["tokens"] == encode(
        "user:x;>"
    )
    assert post("/detokenize", tokens=encode("ab")) == {"prompt": "ab"}
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 1}), ("/detokenize", {"tokens": [999]}), ("/detokenize", {})):
        assert server.http.post(path, json=body).status_code == 400
    assert server.http.get("/version").json() == {"version": __version__}


def test_paths_and_methods_have_errors_of_the_same_shape(server: Running) -> None:
    assert refusal(server.http.get("/v1/nothing")) == (404, "not_found")
    assert refusal(server.http.get("/v1/completions")) == (405, "method_not_allowed")


def test_request_ids(server: Running) -> None:
    assert server.http.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert re.fullmatch(
        "req-[0-9a-f]{24}", server.http.get("/health", headers={"X-Request-Id": "no good"}).headers["x-request-id"]
    )


def test_acceptance_is_in_the_answer_and_in_the_metrics(text_folder: Path) -> None:
    with serving(drafting(fake_session(1, text_folder=text_folder))) as server:
        body = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "include_metrics": True}
        found = server.complete("ab", **body).json()["metrics"]["speculative_decoding"]
        histogram = found["acceptance_histogram"]
        assert sum(histogram) == found["num_spec_steps"] > 0 and min(histogram) >= 0
        assert sum(a * steps for a, steps in enumerate(histogram)) == found["num_accepted_draft_tokens"] > 0
        assert found["mean_acceptance_length"] == 1 + found["num_accepted_draft_tokens"] / found["num_spec_steps"]
        stream = server.complete("ab", **body, stream=True).text.splitlines()
        with_metrics = [line for line in stream if "acceptance_histogram" in line]
        assert len(with_metrics) == 1 and json.loads(with_metrics[0][6:])["choices"][0]["finish_reason"] == "length"
        lines = dict(line.rsplit(" ", 1) for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#"))
        assert float(lines["medusa_generation_tokens_total"]) == 120 and float(lines["medusa_prompt_tokens_total"]) == 4
        assert float(lines["medusa_spec_decode_num_accepted_tokens_total"]) >= found["num_accepted_draft_tokens"]
        places = [float(value) for name, value in lines.items() if "accepted_tokens_per_pos_total" in name]
        assert sum(places) == float(lines["medusa_spec_decode_num_accepted_tokens_total"])
        for name in ("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "num_requests_running",
                     "num_requests_waiting", "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
                     "e2e_request_latency_seconds_count", 'request_success_total{finished_reason="length"}'):  # fmt: skip
            assert f"medusa_{name}" in lines


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    page = server.http.get("/")
    assert (
        page.headers["content-type"].startswith("text/html") and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert not re.search(r"https?://|//[a-z]", re.sub(r"^\s*//.*", "", page.text, flags=re.MULTILINE))


KEYS = st.sampled_from(["type", "text", "5", "include_usage"])

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6) | st.just(1),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "5", "include_usage"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop", "n",
     "logit_bias", "ignore_eos", "priority", "deadline", "logprobs", "stream_options", "best_of", "model", "metadata", "echo",
     "max_tokens", "return_token_ids", "cache_salt", "top_logprobs", "max_completion_tokens", "user", "tools"]
)  # fmt: skip


@settings(max_examples=150)
@given(fields=st.dictionaries(NAMES, VALUES, max_size=3), text=VALUES, stream=st.booleans(), chat=st.booleans())
def test_nothing_that_a_client_sends_is_an_error_of_the_server(
    server: Running, fields: dict[str, Any], text: Any, stream: bool, chat: bool
) -> None:
    body = {"max_tokens": 3, **fields, "stream": stream}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    found = server.http.post(
        "/v1/chat/completions" if chat else "/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert found.status_code in (200, 400, 404, 408), found.text
    assert '"error"' not in found.text if found.status_code == 200 else found.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b"[" * 3000, b'{"a":' * 700, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}']
)
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    found = server.http.post("/v1/completions", content=body, headers=JSON)
    assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"
