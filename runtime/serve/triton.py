"""A bundle as a model of Triton Inference Server's Python backend: streaming, with vLLM's tensor names.

``medusa-deploy triton BUNDLE -o REPOSITORY`` writes the folder that loads this. Requests go the way of HTTP requests: the same
checks, queue and deadlines.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..errors import UsageError
from .errors import ApiError, api_error
from .fields import CompletionFields, parse
from .metrics import acceptance_of
from .service import Choice, Options, Service
from .stream import merged

_LOOK_SECONDS = 0.05
_CONFIG = """# Written by medusa-deploy. Tensor names are those of Triton's vLLM backend; the numbers' are TensorRT-LLM's.
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: True }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ -1 ] }},
  {{ name: "acceptance_rate" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "total_accepted_draft_tokens" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "total_draft_tokens" data_type: TYPE_INT32 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_MODEL }} ]
{parameters}"""
MODEL = '''"""Written by medusa-deploy: the model lies in the package, the bundle beside this file."""

from medusa_deploy.runtime.serve.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def config_text(name: str, parameters: dict[str, str]) -> str:
    """Return ``config.pbtxt``."""
    entry = "parameters {{ key: {} value {{ string_value: {} }} }}\n"
    lines = [entry.format(json.dumps(key), json.dumps(value, ensure_ascii=False)) for key, value in parameters.items()]
    return _CONFIG.format(name=name, parameters="".join(lines))


class TritonPythonModel:
    """The interface that Triton's Python backend calls: ``initialize``, ``execute``, ``finalize``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that lies beside ``model.py``."""
        from .. import load

        self._pb: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        if not bundle.is_dir():  # model_repository is the model's own folder, or the one above it
            bundle = Path(args["model_repository"]) / config["name"] / args["model_version"] / "bundle"
        sizes = {name: int(given[name]) for name in ("slots", "threads") if name in given}
        self._service = Service(Options(name=config["name"], max_waiting=int(given.get("max_waiting", "64"))))
        self._service.open(load(bundle, **sizes))  # type: ignore[arg-type]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medusa-deploy-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Answer all requests beside each other; each by its own sender, so nothing is returned."""
        for request in requests:
            self._submit(request)

    def finalize(self) -> None:
        """End what is under way."""
        asyncio.run_coroutine_threadsafe(self._service.close(cancel=True), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, request: Any) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._answer(request, request.get_response_sender()), self._loop)

    async def _answer(self, request: Any, sender: Any) -> None:
        """Answer one request. Its last response has the final flag, whatever happens."""
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            fields, stream = self._fields(request)
            async with self._service.admitted(fields, fields.prompts) as choices:
                if stream and len(choices) > 1:
                    raise ApiError(400, "a stream has one answer: n is 1", param="n", code="invalid_value")
                texts = [""] * len(choices)
                async for choice, text in _until_cancelled(choices, sender):
                    if stream and text and choice.finish_reason is None:
                        sender.send(self._response([text]))
                    else:
                        texts[choice.index] += text
            if any(choice.finish_reason == "cancelled" and choice.stats is None for choice in choices):
                raise ApiError(499, "the request was cancelled", code="cancelled")
            sender.send(self._response(texts, choices), flags=final)
        except _CancelledError:
            sender.send(self._failure("the request was cancelled", "CANCELLED"), flags=final)
        except Exception as error:  # noqa: BLE001 - every error is a response
            refused = api_error(error)
            codes = {400: "INVALID_ARG", 404: "INVALID_ARG", 429: "UNAVAILABLE", 503: "UNAVAILABLE"}
            sender.send(self._failure(refused.message, codes.get(refused.status, "INTERNAL")), flags=final)

    def _fields(self, request: Any) -> tuple[CompletionFields, bool]:
        text = self._input(request, "text_input")
        if text is None:
            raise UsageError("text_input is missing", hint="send one string")
        given = self._input(request, "sampling_parameters")
        try:
            asked = json.loads(_text(given, "sampling_parameters")) if given is not None else {}
        except (ValueError, RecursionError) as error:
            raise UsageError(f"sampling_parameters isn't JSON: {error}", hint="send an object") from None
        if not isinstance(asked, dict) or {"prompt", "stream"} & asked.keys():
            raise UsageError("sampling_parameters is no object of parameters", hint='send {"max_tokens": 64}, for instance')
        fields, unknown = parse(msgspec.json.encode({**asked, "prompt": _text(text, "text_input")}), CompletionFields)
        if unknown:
            raise UsageError(f"sampling_parameters has {', '.join(unknown)[:200]}", hint="leave out what isn't known")
        return fields, bool(self._input(request, "stream"))

    def _input(self, request: Any, name: str) -> Any:
        tensor = self._pb.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        values = tensor.as_numpy().reshape(-1)
        if len(values) != 1:
            raise UsageError(f"{name} has {len(values)} values", hint="send one")
        return values[0]

    def _response(self, texts: list[str], choices: list[Choice] | None = None) -> Any:
        tensors = [self._pb.Tensor("text_output", np.array([text.encode() for text in texts], np.object_))]
        if choices is not None:
            reasons = [(choice.finish_reason or "abort").encode() for choice in choices]
            found = acceptance_of(*[choice.stats for choice in choices if choice.stats is not None])
            tensors += [
                self._pb.Tensor("finish_reason", np.array(reasons, np.object_)),
                self._pb.Tensor("acceptance_rate", np.array([found["draft_acceptance_rate"]], np.float32)),
                self._pb.Tensor("total_accepted_draft_tokens", np.array([found["num_accepted_draft_tokens"]], np.int32)),
                self._pb.Tensor("total_draft_tokens", np.array([found["num_draft_tokens"]], np.int32)),
            ]
        return self._pb.InferenceResponse(output_tensors=tensors)

    def _failure(self, message: str, code: str) -> Any:
        error = self._pb.TritonError
        return self._pb.InferenceResponse(output_tensors=[], error=error(message, getattr(error, code, error.INTERNAL)))


class _CancelledError(Exception):
    """The client cancelled its request."""


async def _until_cancelled(choices: list[Choice], sender: Any) -> AsyncIterator[tuple[Choice, str]]:
    """Yield the texts of all choices as they come, and look at ``sender`` before each of them and at least every 50 ms.

    Raises:
        _CancelledError: the client cancelled.
    """
    chunks = merged(choices)
    coming: asyncio.Future[Any] = asyncio.ensure_future(anext(chunks))
    try:
        while True:
            await asyncio.wait([coming], timeout=_LOOK_SECONDS)
            if sender.is_cancelled():
                raise _CancelledError
            if not coming.done():
                continue
            try:
                choice, chunk = coming.result()
            except StopAsyncIteration:
                return
            yield choice, chunk.text
            coming = asyncio.ensure_future(anext(chunks))
    finally:
        coming.cancel()
        await asyncio.wait([coming])
        await chunks.aclose()  # type: ignore[attr-defined]


def _text(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} isn't UTF-8: {error}", hint="send text") from None
