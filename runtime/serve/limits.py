"""What stands before every endpoint: a request id, API keys, a limit of concurrency, and one log line a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UsageError
from .errors import ApiError
from .service import Service

_log = logging.getLogger("medusa_deploy.serve")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def read_keys(path: Path) -> frozenset[bytes]:
    """Read API keys: one a line; empty lines and lines that begin with ``#`` are skipped. Returns their SHA-256.

    Raises:
        UsageError: the file can't be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the API keys in {path}: {error}", hint="give a text file with one key a line") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{path} holds no API key", hint="write one key a line, each as from: openssl rand -hex 32")
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


class Gate:
    """Wraps the application. ``/health``, ``/metrics``, ``/version`` and the page need no key and are never refused."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, began, began_ns, status = HttpRequest(scope), time.monotonic(), time.time_ns(), 0
        given = request.headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope["medusa"] = facts = {"request_id": request_id}
        guarded = scope["path"].startswith(_GUARDED)

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        self._running += guarded
        try:
            try:
                if guarded:
                    self._check(request)
            except ApiError as error:
                await error.response()(scope, receive, tagged)
            else:
                await self._app(scope, receive, tagged)
        finally:
            self._running -= guarded
            if guarded:
                if status >= 400:
                    self._service.metrics.refused(status)
                seconds = round(time.monotonic() - began, 6)
                line = {"method": scope["method"], "path": scope["path"][:80], "status": status, "seconds": seconds, **facts}
                _log.info("request", extra={"fields": line})
                if (spans := self._service.spans) is not None:
                    spans.record(request, began_ns, status, facts)

    def _check(self, request: HttpRequest) -> None:
        options = self._service.options
        if options.keys:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            known = [hmac.compare_digest(digest, one) for one in options.keys]
            if kind.lower() != "bearer" or not any(known):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            request.scope["medusa_salt"] = digest.hex()  # whoever has another key shares no cache
        if self._running > options.max_concurrency:
            message = f"{options.max_concurrency} requests are under way, and no more may be"
            raise ApiError(429, message, code="too_many_requests", retry_after=1)


async def read_body(request: HttpRequest, limit: int, seconds: float) -> bytes:
    """Read the body of a JSON request.

    Raises:
        ApiError: it isn't sent as JSON, has more than ``limit`` bytes, or takes more than ``seconds`` to arrive.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site can send other kinds without asking
        raise ApiError(415, f"the body is sent as {kind[:80]!r}; send application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
    size = request.headers.get("content-length", "0")
    if size.isdecimal() and int(size[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body didn't arrive within {seconds:g} s", code="body_timeout") from None
    return bytes(body)


class JsonLines(logging.Formatter):
    """Formats records as JSON, one a line: time, level, event, and the record's ``fields``. Messages hold no text of users."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
        return json.dumps(line, ensure_ascii=True)


