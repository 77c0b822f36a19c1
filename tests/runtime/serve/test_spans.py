"""OpenTelemetry: a span a request, its attributes, the caller's trace, and no cost where nobody asked for it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.serve.spans import Spans, wanted
from medusa_deploy.runtime.session import Session
from support.documents import ROOT
from support.served import Served
from support.server import Running, serving
from support.text import text_bundle

NEEDED = "needs OpenTelemetry: pip install 'medusa-deploy[otel]'"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("spans") / "bundle")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return load(bundle, slots=2, threads=1)


@pytest.fixture
def exporter() -> Any:
    pytest.importorskip("opentelemetry.sdk", reason=NEEDED)
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def traced(session: Session, exporter: Any) -> Iterator[Running]:
    """A server whose spans come to ``exporter``."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(session) as server:
        server.service.spans = Spans(provider, "tiny")
        yield server


def only(exporter: Any) -> Any:
    """The one span. It ends just after its client has read the answer."""
    end = time.monotonic() + 60
    while not exporter.get_finished_spans() and time.monotonic() < end:
        time.sleep(0.01)
    [span] = exporter.get_finished_spans()
    exporter.clear()
    return span


def test_an_answer_is_one_span_with_its_tokens_and_what_they_cost(traced: Running, exporter: Any) -> None:
    asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "n": 2, "include_metrics": True}
    answer = traced.complete("a secret", **asked).json()
    span = only(exporter)
    found = dict(span.attributes)
    assert span.name == "text_completion tiny" and span.kind.name == "SERVER" and span.parent is None
    assert found["gen_ai.operation.name"] == "text_completion" and found["gen_ai.request.model"] == "tiny"
    assert found["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 40
    assert found["gen_ai.response.finish_reasons"] == ("length", "length")
    assert found["gen_ai.request.max_tokens"] == 20 and found["gen_ai.request.choice.count"] == 2
    assert found["http.response.status_code"] == 200 and "error.type" not in found
    took = (span.end_time - span.start_time) / 1e9
    assert 0 < found["gen_ai.response.time_to_first_chunk"] < took
    emitted = found["medusa.steps"] * (1 + found["medusa.accepted_tokens_per_step"])
    assert emitted == pytest.approx(40 - 2, abs=0.1), "the prompt's own step emits the first token of an answer"
    assert "secret" not in span.to_json()


def test_a_stream_is_a_span_of_its_callers_trace(traced: Running, exporter: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True, "ignore_eos": True}
    with traced.http.stream("POST", "/v1/chat/completions", json=body, headers={"traceparent": CALLER}) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    span = only(exporter)
    assert f"00-{span.context.trace_id:032x}-{span.parent.span_id:016x}-01" == CALLER
    assert span.attributes["gen_ai.usage.output_tokens"] == 8 and span.attributes["gen_ai.request.stream"]
    traced.http.post("/v1/chat/completions", json={**body, "stream": False}, headers={"traceparent": CALLER[:-1] + "0"})
    traced.complete("ab", max_tokens=1)
    assert only(exporter).name.startswith("text_completion"), "the caller doesn't record the other trace"


@pytest.mark.parametrize(
    ("body", "status"),
    [({"seed": 1 << 63}, 200), ({"seed": 10**19}, 200), ({"top_k": 10**30}, 200), ({"max_tokens": 10**30}, 400), ({"n": 0}, 400)],
)
def test_whatever_is_asked_for_can_be_sent(traced: Running, exporter: Any, body: dict[str, Any], status: int) -> None:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    assert traced.complete("ab", **{"max_tokens": 2, **body}).status_code == status
    span = only(exporter)
    assert encode_spans([span])
    assert span.attributes.get("error.type") == (str(status) if status >= 400 else None)
    assert span.status.is_unset, "what a client can correct is no error of the server"


def test_what_generates_nothing_has_no_span(traced: Running, exporter: Any) -> None:
    for path in ("/v1/models", "/health", "/metrics", "/nowhere"):
        traced.http.get(path)
    traced.http.post("/tokenize", json={"prompt": "ab"})
    traced.complete("ab", max_tokens=1)
    assert only(exporter).name.startswith("text_completion")


def test_spans_reach_a_collector_before_the_server_ends(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk", reason=NEEDED)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        served = Served(bundle, 2, otel=True)
        import httpx

        httpx.post(f"http://127.0.0.1:{served.port}/v1/completions", json={"prompt": "ab", "max_tokens": 3}, timeout=60)
        assert served.stop() == 0
        collector.shutdown()
    [[sent]] = [ExportTraceServiceRequest.FromString(body).resource_spans for body in bodies]
    resource = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("medusa-deploy", "tests")
    assert [span.name for scope in sent.scope_spans for span in scope.spans] == ["text_completion soaked"]


def test_nothing_is_imported_where_nobody_asked(bundle: Path) -> None:
    program = (
        "import sys; from medusa_deploy.runtime.serve.app import create_app;"
        "from medusa_deploy.runtime.serve.service import Options, Service;"
        "create_app(Service(Options())); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_environment_says_whether_spans_are_wanted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wanted() is expected


@pytest.mark.parametrize(("name", "value"), [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")])
def test_what_can_not_be_done_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=value) as caught:
        Spans.from_environment("tiny")
    assert "http/protobuf" in caught.value.hint
