"""Finds the special tokens of a GGUF file as llama.cpp does: by their ids in the metadata, and by their texts."""

from __future__ import annotations

from enum import IntEnum

from ....runtime.errors import CheckpointError
from .metadata import GgufFile

_AGAIN = "download or convert the file again"
# Ids of the metadata that end an answer, a turn or a message.
_ENDS = ("eos", "eot", "eom")
# Texts that end a turn or an answer in any model that has them.
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
# Tokens of code models that fill a gap. llama.cpp looks for their texts where the metadata has no id.
_FILL_TEXTS = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
                "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
                "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
                "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_FILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")  # an answer ends at them, too
_OLD_NAMES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})  # parts of answers, whatever their type
_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}  # ids in SentencePiece's vocabularies


class Kind(IntEnum):
    """GGUF's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_tokens(file: GgufFile) -> list[str]:
    """Return the texts of all tokens; none if the file has no vocabulary. Empty texts get names of their own."""
    tokens = file.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens of {file.path.name} isn't a list of texts", hint=_AGAIN)
    return [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]


def read_kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    """Return the type of each token. Some texts have a type in llama.cpp, whatever the file says."""
    kinds = file.get("tokenizer.ggml.token_type", [int(Kind.NORMAL)] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type of {file.path.name} isn't a list of {len(tokens)} types", hint=_AGAIN)
    control = _END_TEXTS.union(*(_fill_texts(file, name) for name in _FILL_TEXTS))
    shown = dict.fromkeys(_SHOWN, Kind.USER_DEFINED)
    forced = dict.fromkeys(control, Kind.CONTROL) | shown | _exceptions(file, tokens)
    return [int(forced.get(token, kind)) for token, kind in zip(tokens, kinds, strict=True)]


def special_token(file: GgufFile, name: str) -> int | None:
    """Return the id of the token ``name`` (``bos``, ``eos``, ``unknown`` …), or None if the file has none.

    SentencePiece's vocabularies have defaults. llama.cpp has one for byte-level vocabularies, too (11, from Falcon), which
    no other model means.

    Raises:
        CheckpointError: no token has this id.
    """
    count = len(read_tokens(file))
    number = file.token(name)
    if number is None and file.get("tokenizer.ggml.model") == "llama" and _DEFAULTS.get(name, count) < count:
        return _DEFAULTS[name]
    if number is not None and count and number >= count:
        raise CheckpointError(f"{file.path.name} has {count} tokens and names the token {number} ({name})", hint=_AGAIN)
    return number


def stop_tokens(file: GgufFile) -> tuple[int, ...]:
    """Return the ids of all tokens that end an answer or a turn."""
    tokens = read_tokens(file)
    normal = _exceptions(file, tokens)
    return tuple(number for number in sorted(_ends(file, tokens)) if not tokens or tokens[number] not in normal)


def _ends(file: GgufFile, tokens: list[str]) -> set[int]:
    named = [special_token(file, name) for name in (*_ENDS, *_FILL_ENDS)]
    texts = _END_TEXTS.union(*(_fill_texts(file, name) for name in _FILL_ENDS))
    return {number for number in named if number is not None} | {n for n, token in enumerate(tokens) if token in texts}


def _fill_texts(file: GgufFile, name: str) -> tuple[str, ...]:
    """List the texts to look for: none where the metadata has the id."""
    known = file.token(name) is not None or (name in _OLD_NAMES and file.token(_OLD_NAMES[name]) is not None)
    return () if known else _FILL_TEXTS[name]


def _exceptions(file: GgufFile, tokens: list[str]) -> dict[str, Kind]:
    """Return the texts that end nothing in vocabularies with certain other ends, and their types there."""
    ends = {tokens[number] for number in _ends(file, tokens) if tokens}
    found = {}
    if ends & {"<|call|>", "<|calls|>"} and ends & {"<|return|>", "<|flush|>"}:
        found["<|end|>"] = Kind.USER_DEFINED  # gpt-oss and Solar: it ends a message
    if ends & {"<|tool_response>", "<|plamo:eos|>"}:
        found["</s>"] = Kind.NORMAL
    return found
