"""Encodes prompts as token ids, with the tokenizer and the chat template of a checkpoint."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PromptError
from ..request import Message, Request

if TYPE_CHECKING:
    from pathlib import Path

    from ..files.manifest import TextFacts


class PromptEncoder:
    """Encodes requests. ``path`` returns the path of a file that ``text`` names. Files are read when they are first needed."""

    def __init__(self, text: TextFacts, vocab_size: int, path: Callable[[str], Path]) -> None:
        self.text, self.vocab_size = text, vocab_size
        self._path = path
        self._codec: Any = None
        self._template: Any = None

    @property
    def codec(self) -> Any:
        """The tokenizer (:class:`.tokenizer.TextCodec`); None if the bundle takes token ids only."""
        if self._codec is None and self.text.tokenizer is not None:
            from .tokenizer import TextCodec

            self._codec = TextCodec(self._path(self.text.tokenizer))
        return self._codec

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Renders messages with the chat template, up to the beginning of the answer. ``tools``: functions to show to the model.

        Raises:
            PromptError: the bundle has no chat template, or a message is malformed.
            TemplateError: the template fails.
        """
        if self.text.chat_template is None:
            raise PromptError("the bundle has no chat template", hint="give prompt=… or token_ids=… instead of messages")
        if self._template is None:
            from .template import ChatTemplate

            source = self._path(self.text.chat_template).read_text("utf-8")
            self._template = ChatTemplate(source, self.text.special_tokens)
        return str(self._template.render(messages, tools))

    def encode(self, request: Request) -> list[int]:
        """Encodes the request's prompt as token ids.

        Raises:
            PromptError: the request doesn't have exactly one kind of prompt, the prompt is empty, an id is outside the
                vocabulary, or the bundle has no tokenizer for a text.
        """
        if request.tools and request.messages is None:
            raise PromptError("got tools without messages", hint="a chat template shows tools: give messages")
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(request, name) is not None]
        if len(given) != 1:
            raise PromptError(f"got {given or 'no prompt'}", hint="give exactly one of prompt, messages and token_ids")
        if request.token_ids is not None:
            ids = _integers(request.token_ids)
        elif self.codec is None:
            raise PromptError("the bundle has no tokenizer", hint="give token_ids=…")
        else:
            text = self.render(request.messages, request.tools) if request.messages is not None else request.prompt
            # A chat template writes its own special tokens; a plain prompt gets the tokenizer's.
            ids = self.codec.encode(text, add_special_tokens=request.messages is None)
        if not ids:
            raise PromptError("the prompt is empty", hint="give at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise PromptError(
                f"token ids must be in 0 … {self.vocab_size - 1}, got {min(ids)} … {max(ids)}",
                hint="use the bundle's own tokenizer",
            )
        return ids


def _integers(token_ids: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in token_ids]
    except TypeError:
        raise PromptError(f"token_ids is {str(token_ids)[:80]}", hint="token_ids is a list of integers") from None
