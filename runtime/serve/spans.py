"""OpenTelemetry spans: one a generation request, without a word of its text. Needs the extra ``otel``.

The standard ``OTEL_*`` variables say where spans go, how many are kept and what the service is called.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, UsageError
from .fields import Fields

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from starlette.requests import Request as HttpRequest

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_PLACES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
_ASKED = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "stream")
_SHUTDOWN_SECONDS = 5.0
_NO_INT64 = 1 << 63


def wanted() -> bool:
    """Whether the environment asks for spans: it names a collector or an exporter, and doesn't switch them off."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    return not off and any(os.environ.get(name) for name in _PLACES)


class Spans:
    """Writes spans to a provider of tracers. ``name``: of the model that is served."""

    def __init__(self, provider: TracerProvider, name: str) -> None:
        from ... import __version__

        self._provider, self._name = provider, name
        self._tracer = provider.get_tracer("medusa_deploy", __version__)

    @classmethod
    def from_environment(cls, name: str) -> Spans:
        """Return spans that go where the environment says; http://localhost:4318 where it says nothing.

        Raises:
            MissingDependencyError: OpenTelemetry isn't installed.
            UsageError: the environment asks for a protocol or an exporter that isn't there.
        """
        kind = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
        variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(os.environ.get, variables)), "http/protobuf")
        if kind not in ("otlp", "console") or protocol != "http/protobuf":
            raise UsageError(
                f"spans can't go to the exporter {kind!r:.80} by {protocol!r:.80}",
                hint="set OTEL_TRACES_EXPORTER to otlp, console or none, and OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf",
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
        except ImportError:
            message = "OpenTelemetry isn't installed"
            raise MissingDependencyError(message, hint="install it with: pip install 'medusa-deploy[otel]'") from None
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "medusa-deploy"})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter() if kind == "otlp" else ConsoleSpanExporter()))
        return cls(provider, name)

    def record(self, request: HttpRequest, began: int, status: int, facts: Mapping[str, Any]) -> None:
        """Write the span of a request that has ended; requests that generate nothing have none.

        ``began``: nanoseconds of the clock. ``status``: of HTTP, 0 where the client left before. ``facts``: of its log line.
        """
        path = request.scope["path"]
        operation = OPERATIONS.get(path)
        if operation is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        fields: Fields | None = request.scope.get("medusa_fields")
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "medusa-deploy",
            "gen_ai.request.model": self._name,
            "http.request.method": request.method,
            "url.path": path,
            "http.response.status_code": status or None,
            "medusa.request_id": facts["request_id"],
            **({} if fields is None else _asked(fields)),
            **_answered(facts),
        }
        failed = "error" in facts.get("finish_reasons", ())
        if failed or status >= 400:
            attributes["error.type"] = "engine" if failed else str(status)
        span = self._tracer.start_span(
            f"{operation} {self._name}",
            extract({name: value for name, value in request.headers.items() if name in ("traceparent", "tracestate")}),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            start_time=began,
        )
        if failed or status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, for a few seconds at most: a collector that doesn't answer must not hold the server up."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_SHUTDOWN_SECONDS)


def _asked(fields: Fields) -> dict[str, Any]:
    """What a request asks for, without numbers that a span has no room for."""
    asked = {name: getattr(fields, name) for name in _ASKED} | {"max_tokens": fields.limit[1], "choice.count": fields.n}
    return {
        f"gen_ai.request.{name}": value for name, value in asked.items() if not isinstance(value, int) or abs(value) < _NO_INT64
    }


def _answered(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What it got. All of it is missing where a request was refused."""
    return {
        "gen_ai.usage.input_tokens": facts.get("prompt_tokens"),
        "gen_ai.usage.cache_read.input_tokens": facts.get("cached_tokens"),
        "gen_ai.usage.output_tokens": facts.get("completion_tokens"),
        "gen_ai.response.finish_reasons": facts.get("finish_reasons"),
        "gen_ai.response.time_to_first_chunk": facts.get("first_token_seconds"),
        "medusa.queue_seconds": facts.get("queue_seconds"),
        "medusa.steps": facts.get("steps"),
        "medusa.accepted_tokens_per_step": facts.get("accepted_per_step"),
    }
