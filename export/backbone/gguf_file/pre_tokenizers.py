"""Knows how text is split before byte-level BPE, by the names that llama.cpp gives to the rules (``tokenizer.ggml.pre``)."""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_MARKS = r" ?[^\s\p{L}\p{N}]+"


def _words(numbers: str) -> str:
    """GPT-4's rule, with runs of ``numbers``."""
    return rf"{_CONTRACTIONS}|{_BEFORE_WORD}\p{{L}}+|{numbers}|{_MARKS}[\r\n]*|\s*[\r\n]+|{_SPACES}"


def _cased(end: str, numbers: str) -> str:
    """The rule of tekken and GPT-4o: words end where the case changes. llama.cpp's own form of it errs outside ASCII."""
    return (
        rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{end}|{_BEFORE_WORD}{_UPPER}+{_LOWER}*{end}"
        rf"|{numbers}|{_MARKS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule by which text is split.

    ``patterns``: each splits what those before it left, between and at its matches. ``whole_first``: a piece that is a token
    stays one, whatever the merges say. ``bos``: prompts begin with that token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_first: bool = False
    bos: bool = False


_LLAMA3 = Rule((_words(r"\p{N}{1,3}"),), whole_first=True, bos=True)
_GPT4 = Rule((_words(r"\p{N}{1,3}"),))
_GLM4 = Rule((_words(r"\p{N}{1,3}"),), whole_first=True)
_QWEN2 = Rule((_words(r"\p{N}"),))
_DIGITS = Rule((r"\p{N}", _GPT2))
_PLAIN = Rule((_GPT2,))
_GPT4O = Rule((_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
_BY_RULE = (
    (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_GPT4, "dbrx smaug-bpe chatglm-bpe"),
    (_GLM4, "glm4 glm5"),
    (_QWEN2, "qwen2 stablelm2 deepseek-r1-qwen megrez kormo f2llmv2 hunyuan solar-open"),
    (_DIGITS, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_PLAIN, "gpt-2 phi-2 mpt olmo jais jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat"),
    (_PLAIN, "a.x-4.0 mellum exaone4 modern-bert trillion granite-docling"),
    (_GPT4O, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (Rule((_cased("", r"\p{N}"),), whole_first=True, bos=True), "tekken"),
    (Rule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
)
RULES = {name: rule for rule, names in _BY_RULE for name in names.split()}
