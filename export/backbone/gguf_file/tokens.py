"""Finds the special tokens of a GGUF file as llama.cpp does: by their ids in the metadata, and by their texts."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from ....runtime.errors import CheckpointError
from .metadata import GgufFile

_AGAIN = "download or convert the file again"
# Ids of the metadata that end an answer, a turn or a message, and the fill-in tokens at which llama.cpp stops, too.
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Texts that end a turn or an answer in any model that has them.
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<|eot|>", "<EOT>", "_<EOT>", "< EOT >", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<｜end▁of▁sentence｜>", "<|end_of_turn|>", "<turn|>", "<|tool_response>", "<|end▁of▁sentence|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>", "<|file_sep|>",
})  # fmt: skip


class Kind(IntEnum):
    """GGUF's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_tokens(file: GgufFile) -> list[str]:
    """Return the texts of all tokens; none if the file has no vocabulary."""
    tokens = file.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens of {file.path.name} isn't a list of texts", hint=_AGAIN)
    return tokens


def read_kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    """Return the type of each token. Tokens that end an answer by their text are control tokens, whatever the file says."""
    kinds = file.get("tokenizer.ggml.token_type", [int(Kind.NORMAL)] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type of {file.path.name} isn't a list of {len(tokens)} types", hint=_AGAIN)
    return [int(Kind.CONTROL) if token in _END_TEXTS else kind for token, kind in zip(tokens, kinds, strict=True)]


def bos_token(file: GgufFile) -> int | None:
    """Return the id of the begin-of-sequence token, if the file has one."""
    return file.token("bos")


def stop_tokens(file: GgufFile) -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer or a turn."""
    tokens = read_tokens(file)
    by_id: list[Any] = [file.token(name) for name in _ENDS]
    found = {number for number in by_id if number is not None}
    found |= {number for number, token in enumerate(tokens) if token in _END_TEXTS}
    if tokens and max(found, default=0) >= len(tokens):
        raise CheckpointError(f"{file.path.name} has {len(tokens)} tokens and names the token {max(found)}", hint=_AGAIN)
    return tuple(sorted(found))
