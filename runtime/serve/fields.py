"""The fields of requests: parsing, and the refusal of known ones that can't be honoured."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..request import MAX_LOGPROBS
from ..sampling import SamplingParams
from .errors import ApiError
from .forms import FORMS, Form, asked_form
from .messages import Message, plain_messages
from .tools import ToolUse, tool_use

if TYPE_CHECKING:
    from ..grammar import Grammar
    from ..text.encoder import PromptEncoder

_OFF: tuple[Any, ...] = (None,)
_NONE: tuple[Any, ...] = (None, [])
# Fields that people know from other servers and that this one doesn't honour, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("functions", "documents", "stop_token_ids", "bad_words", "allowed_token_ids"), _NONE),
    "function_call": (None, "none", "auto"),
    **dict.fromkeys(("grammar", "json_schema", "audio", "prediction", "web_search_options", "chat_template"), _OFF),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "logits_processors", "thinking_token_budget"), _OFF),
    **dict.fromkeys(("store", "echo", "continue_final_message", "use_beam_search", "background"), (None, False)),
    **dict.fromkeys(("return_tokens_as_token_ids",), (None, False)),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens", "spaces_between_special_tokens"), (None, True)),
    **dict.fromkeys(("length_penalty", "typical_p"), (None, 1)),
    **dict.fromkeys(("min_tokens", "dry_multiplier", "xtc_probability", "mirostat"), (None, 0)),
    "modalities": (None, ["text"]),
    "chat_template_kwargs": (None, {}),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "suffix": (None, ""),
    "add_special_tokens": (None,),  # the template writes those of a chat, the tokenizer those of a text
}
# Fields that change nothing that is generated.
_HARMLESS = {"user", "safety_identifier", "prompt_cache_key"}
_PATH = re.compile(r"(.*) - at `\$\.?([^`]*)`$")


class StreamOptions(msgspec.Struct):
    """``stream_options``."""

    include_usage: bool | None = None


class Fields(msgspec.Struct, kw_only=True, dict=True):
    """What both endpoints take. ``deadline``: seconds; ``include_metrics``: report the acceptance of this answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    include_metrics: bool | None = None
    metadata: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    deadline: float | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @cached_property
    def form(self) -> Form | None:
        """The form that the answer is asked for in."""
        return asked_form({name: getattr(self, name) for name in FORMS})

    @property
    def grammar_field(self) -> str | None:
        """The field that a grammar comes from."""
        return None if self.form is None else self.form.field

    def grammar(self, encoder: PromptEncoder) -> Grammar | None:
        """The grammar that the answer is held to. ``encoder``: knows how the model writes calls."""
        return None if self.form is None else self.form.grammar()

    @property
    def choices(self) -> int:
        """Answers wanted of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> tuple[str, int | None]:
        """The number of new tokens that is asked for, and the name of its field."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """Alternatives wanted at each token; None: no log-probabilities."""
        raise NotImplementedError

    def sampling(self, vocab_size: int, choice: int) -> SamplingParams:
        """Return the sampling parameters of one choice: temperature 0 is greedy, and each choice has a seed of its own.

        Raises:
            SamplingError: a parameter is out of its range.
        """
        seed = None if self.seed is None else (self.seed + choice) % (1 << 64)
        shared: dict[str, Any] = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _bias(self.logit_bias or {}),
        }
        filters: dict[str, Any] = {"top_p": self.top_p, "min_p": self.min_p, "top_k": 0 if self.top_k == -1 else self.top_k}
        greedy = self.temperature == 0
        params = SamplingParams("sample", 1.0 if greedy else self.temperature, seed=seed, **filters, **shared)  # type: ignore[arg-type]
        params.validate(vocab_size)
        # Filters keep the most likely token, so they change nothing that is greedy.
        return SamplingParams(**shared) if greedy else params


class ChatFields(Fields, kw_only=True):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """The tools that the answer may call, if there are any."""
        return tool_use(self.tools, self.tool_choice, several=self.parallel_tool_calls is not False)

    @property
    def grammar_field(self) -> str | None:
        """See :class:`Fields`."""
        return "tools" if self.tool_use is not None else super().grammar_field

    def grammar(self, encoder: PromptEncoder) -> Grammar | None:
        """See :class:`Fields`."""
        use, form = self.tool_use, self.form
        if use is None:
            return None if form is None else form.grammar()
        if form is not None:
            message = f"{form.field} and tools can't be used together"
            raise ApiError(400, message, param=form.field, code="unsupported_parameter")
        return use.grammar(encoder)

    @property
    def limit(self) -> tuple[str, int | None]:
        """The newer name first."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """See :class:`Fields`."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        return _count("top_logprobs", self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompt as a field of :class:`..request.Request`."""
        use = self.tool_use
        return [{"messages": plain_messages(self.messages), "tools": None if use is None else use.shown}]


class CompletionFields(Fields, kw_only=True):
    """The body of ``/v1/completions``."""

    prompt: Any
    logprobs: int | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """16 tokens unless told, as OpenAI has it."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """See :class:`Fields`."""
        return None if self.logprobs is None else _count("logprobs", self.logprobs)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as a field of :class:`..request.Request`."""
        given = self.prompt
        several = isinstance(given, list) and given and not all(_is_token(each) for each in given)
        found: list[dict[str, Any]] = []
        for each in given if several else [given]:
            if isinstance(each, str):
                found.append({"prompt": each})
            elif isinstance(each, list) and all(_is_token(token) for token in each):
                found.append({"token_ids": each})
            else:
                message = "prompt is a string, a list of token ids, or a list of either"
                raise ApiError(400, message, param="prompt", code="invalid_type")
        return found


class TokenizeFields(msgspec.Struct, kw_only=True):
    """The body of ``/tokenize``."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """The body of ``/detokenize``."""

    tokens: list[int]


Parsed = TypeVar("Parsed", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Parsed]) -> tuple[Parsed, list[str]]:
    """Parse the JSON of a request. Returns the fields, and the names of those that nobody knows.

    Raises:
        ApiError: no JSON object, a wrong type, or a known field that can't be honoured.
    """
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body isn't JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body isn't a JSON object", code="invalid_json")
    special: dict[str, tuple[Any, ...]] = {"add_special_tokens": (None, kind is not ChatFields)}
    if kind is CompletionFields:
        special |= {"tools": _NONE, "tool_choice": (None, "none", "auto")}
    for name, values in () if kind is TokenizeFields else {**REFUSED, **special}.items():
        if name in given and given[name] not in values:
            raise ApiError(400, f"{name} isn't supported by this server", param=name, code="unsupported_parameter")
    try:
        fields = msgspec.convert(given, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        found = _PATH.match(str(error))
        message, param = (found[1], found[2]) if found else (str(error), None)
        missing = re.search(r"missing required field `(\w+)`", message)
        param = missing[1] if missing and not param else param
        raise ApiError(400, f"{param or 'the body'}: {message}", param=param, code="invalid_type") from None
    known = {*kind.__struct_fields__, *REFUSED, *special, *_HARMLESS}
    return fields, [name for name in given if name not in known]


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(name: str, value: int) -> int:
    if not 0 <= value <= MAX_LOGPROBS:
        raise ApiError(400, f"{name} is {value}; it is 0 to {MAX_LOGPROBS}", param=name, code="invalid_value")
    return value


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        message = "logit_bias has a key that isn't a token id"
        raise ApiError(400, message, param="logit_bias", code="invalid_value") from None
