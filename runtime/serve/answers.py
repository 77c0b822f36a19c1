"""The shapes of answers: chats and completions, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..request import TokenLogprob
from ..text.tool_calls import CallReader, ToolCall
from .fields import ChatFields, Fields
from .metrics import acceptance_of
from .service import Choice

if TYPE_CHECKING:
    from ..text.tokenizer import TextCodec


class Answer:
    """Makes the JSON of one answer. ``codec``: spells tokens."""

    kind = "text_completion"
    piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, fields: Fields, name: str, codec: TextCodec | None, *, metrics: bool) -> None:
        self._fields, self._codec = fields, codec
        self._metrics = metrics or bool(fields.include_metrics)
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._offsets: dict[int, int] = {}

    def piece(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream; its usage is null where a last event has it."""
        usage = {"usage": None} if self._fields.include_usage else {}
        return {**self._head, "object": self.piece_kind, "choices": choices, **usage, **more}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first event of a choice, if it has one before its first text."""

    def delta(
        self, choice: Choice, text: str, ids: list[int], logprobs: list[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any] | None:
        """A choice in an event; None where there is nothing to say yet."""
        return self._choice(choice, {"text": text}, ids, logprobs, reason)

    def whole(self, choices: list[tuple[Choice, str, list[TokenLogprob] | None]]) -> dict[str, Any]:
        """The answer in one piece."""
        said = [self._whole(*each) for each in choices]
        every = [choice for choice, _, _ in choices]
        return {**self._head, "object": self.kind, "choices": said, "usage": self.usage(every), **self.acceptance(every)}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """Counts of tokens; a prompt with several answers counts once."""
        firsts = [choice for choice in choices if choice.index % self._fields.choices == 0]
        prompts = sum(len(choice.prompt) for choice in firsts)
        emitted = sum(len(choice.token_ids) for choice in choices)
        cached = sum(choice.stats.cached_tokens for choice in firsts if choice.stats is not None)
        counts = {"prompt_tokens": prompts, "completion_tokens": emitted, "total_tokens": prompts + emitted}
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    def acceptance(self, choices: list[Choice]) -> dict[str, Any]:
        """The field ``metrics``, where it is asked for."""
        if not self._metrics:
            return {}
        found = [each.stats for each in choices if each.stats is not None]
        queued = max((stats.queue_seconds for stats in found), default=0.0)
        return {"metrics": {"speculative_decoding": acceptance_of(*found), "queue_seconds": queued}}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _whole(self, choice: Choice, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return self._choice(choice, {"text": text}, choice.token_ids, logprobs, choice.finish_reason)

    def _choice(
        self, choice: Choice, content: dict[str, Any], ids: list[int], logprobs: list[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any]:
        said = {"index": choice.index, **content, "finish_reason": reason}
        said["logprobs"] = None if self._fields.top is None else self._logprobs(choice, logprobs or [])
        if self._fields.return_token_ids:
            said["token_ids"] = ids
        return said

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> dict[str, Any]:
        texts = [self._spelt(each.token_id)[0] for each in entries]
        offsets = list(accumulate(map(len, texts), initial=self._offsets.get(choice.index, 0)))
        self._offsets[choice.index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in entries],
            "top_logprobs": [{self._spelt(token)[0]: value for token, value in reversed(each.top)} for each in entries],
            "text_offset": offsets,
        }

    def _spelt(self, token: int) -> tuple[str, list[int]]:
        """A token's text and bytes. Bytes that are no character by themselves are U+FFFD in the text."""
        spelt = b"" if self._codec is None else self._codec.token_bytes(token)
        return spelt.decode("utf-8", "replace"), list(spelt)


class ChatAnswer(Answer):
    """Makes the JSON of an assistant's message."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, fields: Fields, name: str, codec: TextCodec | None, *, metrics: bool) -> None:
        super().__init__(fields, name, codec, metrics=metrics)
        self._calls = isinstance(fields, ChatFields) and fields.tool_use is not None
        self._readers: dict[int, CallReader] = {}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Name the role first."""
        return self._choice(choice, {"delta": {"role": "assistant", "content": ""}}, [], None, None)

    def delta(
        self, choice: Choice, text: str, ids: list[int], logprobs: list[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any] | None:
        """A choice in an event; None where there is nothing to say yet. A call is said once, when it is complete."""
        if not self._calls:
            return self._choice(choice, {"delta": {"content": text} if text or reason is None else {}}, ids, logprobs, reason)
        reader = self._readers.setdefault(choice.index, CallReader())
        said, calls = reader.push(text)
        first = len(reader.calls) - len(calls)
        said += reader.flush() if reason is not None else ""
        delta: dict[str, Any] = {"content": said} if said else {}
        if calls:
            delta["tool_calls"] = [{"index": first + place, **_spelt_call(call)} for place, call in enumerate(calls)]
        if not delta and reason is None and not (self._fields.return_token_ids or logprobs):
            return None
        return self._choice(choice, {"delta": delta}, ids, logprobs, _reason(reason, reader))

    def _whole(self, choice: Choice, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reader = CallReader()
        if self._calls:
            said, calls = reader.push(text)
            said += reader.flush()
            if calls:
                message |= {"content": said or None, "tool_calls": [_spelt_call(call) for call in calls]}
        return self._choice(choice, {"message": message}, choice.token_ids, logprobs, _reason(choice.finish_reason, reader))

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, spelt = self._spelt(token)
            return {"token": text, "logprob": logprob, "bytes": spelt}

        tops = [[entry(*pair) for pair in each.top] for each in entries]
        pairs = zip(entries, tops, strict=True)
        return {
            "content": [{**entry(each.token_id, each.logprob), "top_logprobs": top} for each, top in pairs],
            "refusal": None,
        }


def _spelt_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _reason(reason: str | None, reader: CallReader) -> str | None:
    return "tool_calls" if reader.calls and reason == "stop" else reason
