"""The application: routes, and what each of them does."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import wraps
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from ..request import Request
from .answers import Answer, ChatAnswer
from .errors import ApiError, api_error, json_response
from .fields import ChatFields, CompletionFields, DetokenizeFields, Parsed, TokenizeFields, parse
from .limits import Gate, read_body
from .messages import plain_messages
from .page import page
from .service import Choice, Service
from .stream import ClientGoneError, EventStream, events, while_connected, whole

Endpoint = Callable[[HttpRequest], Awaitable[Response]]
_log = logging.getLogger("medusa_deploy.serve")


def create_app(service: Service) -> Starlette:
    """Return the ASGI application over ``service``, which may be opened later: until then it answers 503."""
    routes = _Routes(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", _guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", _guarded(routes.completions), methods=["POST"]),
            Route("/v1/models", _guarded(routes.models), methods=["GET"]),
            Route("/v1/models/{name:path}", _guarded(routes.model), methods=["GET"]),
            Route("/tokenize", _guarded(routes.tokenize), methods=["POST"]),
            Route("/detokenize", _guarded(routes.detokenize), methods=["POST"]),
            Route("/health", _guarded(routes.health), methods=["GET"]),
            Route("/health/ready", _guarded(routes.ready), methods=["GET"]),
            Route("/metrics", _guarded(routes.metrics), methods=["GET"]),
            Route("/version", _guarded(routes.version), methods=["GET"]),
            Route("/", page, methods=["GET"]),
        ],
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={HTTPException: _no_route},
    )


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Answer whatever ``endpoint`` raises in OpenAI's shape."""

    @wraps(endpoint)
    async def guarded(request: HttpRequest) -> Response:
        try:
            return await endpoint(request)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; the log shows it
        except Exception as error:  # noqa: BLE001 - every error has a shape, also our own bugs
            return api_error(error).response()

    return guarded


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:80]}"
    return ApiError(error.status_code, f"{what}: {error.detail}", code=error.detail.lower().replace(" ", "_")).response()


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service, self._options = service, service.options

    # -- generation ------------------------------------------------------------------------------------------------

    async def chat(self, request: HttpRequest) -> Response:
        fields = await self._parsed(request, ChatFields)
        return await self._generate(request, fields, ChatAnswer)

    async def completions(self, request: HttpRequest) -> Response:
        fields = await self._parsed(request, CompletionFields)
        return await self._generate(request, fields, Answer)

    async def _generate(self, request: HttpRequest, fields: ChatFields | CompletionFields, kind: type[Answer]) -> Response:
        session = self._service.session
        answer = kind(fields, self._options.name, session.codec, metrics=self._options.acceptance_metrics)
        async with AsyncExitStack() as owned:
            admitted = self._service.admitted(fields, fields.prompts, request.scope.get("medusa_salt", ""))
            choices = await owned.enter_async_context(admitted)
            owned.callback(_note, request, choices)
            if not fields.stream:
                return json_response(await while_connected(request, whole(answer, choices, self._service)))
            return EventStream(events(answer, fields, choices), owned.pop_all())

    # -- text ------------------------------------------------------------------------------------------------------

    async def tokenize(self, request: HttpRequest) -> Response:
        fields = await self._parsed(request, TokenizeFields)
        session = self._service.session
        if (fields.prompt is None) == (fields.messages is None):
            raise ApiError(400, "give exactly one of prompt and messages", param="prompt", code="invalid_value")
        if session.codec is None:
            raise ApiError(400, "the model has no tokenizer", code="no_tokenizer")
        try:
            if fields.messages is not None:
                ids = await self._service.in_thread(session.encode, Request(messages=plain_messages(fields.messages)))
            else:
                special = fields.add_special_tokens is not False
                ids = await self._service.in_thread(lambda: session.codec.encode(fields.prompt, add_special_tokens=special))
        except Exception as error:
            raise api_error(error, param="prompt" if fields.messages is None else "messages") from error
        return json_response({"count": len(ids), "max_model_len": session.manifest.limits.capacity, "tokens": ids})

    async def detokenize(self, request: HttpRequest) -> Response:
        fields = await self._parsed(request, DetokenizeFields)
        session = self._service.session
        if session.codec is None:
            raise ApiError(400, "the model has no tokenizer", code="no_tokenizer")
        vocab_size = session.manifest.backbone.vocab_size
        if any(not 0 <= token < vocab_size for token in fields.tokens):
            raise ApiError(400, f"token ids are 0 to {vocab_size - 1}", param="tokens", code="invalid_value")
        return json_response({"prompt": await self._service.in_thread(session.codec.decode, fields.tokens)})

    async def _parsed(self, request: HttpRequest, kind: type[Parsed]) -> Parsed:
        _ = self._service.session  # a server that isn't ready reads no body
        body = await read_body(request, self._options.max_body_bytes, self._options.body_seconds)
        fields, unknown = parse(body, kind)
        request.scope["medusa_fields"] = fields
        if unknown:
            request.scope["medusa"]["unknown_fields"] = [name[:40] for name in unknown[:10]]
        return fields

    # -- facts -----------------------------------------------------------------------------------------------------

    async def models(self, request: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._options.name:
            raise ApiError(404, f"the model {name[:80]!r} isn't served here", param="model", code="model_not_found")
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        capacity = self._service.session.manifest.limits.capacity
        facts = {"created": int(self._service.started), "owned_by": "medusa-deploy", "max_model_len": capacity}
        return {"id": self._options.name, "object": "model", **facts}

    async def health(self, request: HttpRequest) -> Response:
        """Alive: also while it loads or closes, but not with an engine that hangs."""
        state = self._service.state
        return json_response({"status": state}, 503 if state == "stalled" else 200)

    async def ready(self, request: HttpRequest) -> Response:
        """Ready for requests."""
        state = self._service.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: HttpRequest) -> Response:
        return Response(self._service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: HttpRequest) -> Response:
        from ... import __version__

        return json_response({"version": __version__})


def _note(request: HttpRequest, choices: list[Choice]) -> None:
    """Add the costs of a request to its log line."""
    firsts = [choice.first - choice.arrived for choice in choices if choice.first is not None]
    stats = [choice.stats for choice in choices if choice.stats is not None]
    steps = sum(each.steps for each in stats)
    accepted = sum(count * many for each in stats for count, many in each.accepted.items())
    request.scope["medusa"] |= {
        "prompt_tokens": len(choices[0].prompt),
        "cached_tokens": sum(each.cached_tokens for each in stats),
        "completion_tokens": sum(len(choice.token_ids) for choice in choices),
        "finish_reasons": [choice.finish_reason or "abort" for choice in choices],
        "first_token_seconds": round(min(firsts), 6) if firsts else None,
        "queue_seconds": round(max(each.queue_seconds for each in stats), 6) if stats else None,
        "steps": steps if stats else None,
        "accepted_per_step": round(accepted / steps, 3) if steps else None,
    }
