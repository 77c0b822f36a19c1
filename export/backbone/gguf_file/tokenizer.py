"""Builds the tokenizer of a GGUF file: byte-level BPE, or SentencePiece's BPE with byte fallback."""

from __future__ import annotations

from typing import Any

from ....runtime.errors import CheckpointError
from .metadata import GgufFile
from .pre_tokenizers import RULES
from .tokens import Kind, read_kinds, read_tokens, special_token

_AGAIN = "download or convert the file again"
_OTHER_TOKENIZER = "give the model as a folder of safetensors with its tokenizer.json instead"
_SPACE = "▁"
_WHOLE = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)  # types of tokens that are looked for before a text is split


def gguf_tokenizer(file: GgufFile) -> str | None:
    """Build the text of ``tokenizer.json``; None if the file has no vocabulary.

    Raises:
        CheckpointError: a kind of tokenizer or a rule of splitting that isn't known, or a damaged vocabulary.
    """
    kind = file.text("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    tokens = read_tokens(file)
    kinds = read_kinds(file, tokens)
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        number, token = next((number, token) for number, token in enumerate(tokens) if vocab[token] != number)
        raise CheckpointError(f"{file.path.name} has two tokens {token!r}: {number} and {vocab[token]}", hint=_AGAIN)
    if kind == "gpt2":
        tokenizer = _byte_level(file, vocab)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens, vocab, kinds)
    else:
        raise CheckpointError(f"{file.path.name} has a tokenizer of the kind {kind!r}, which isn't read", hint=_OTHER_TOKENIZER)
    _frame(tokenizer, file, tokens, kind)
    _add_tokens(tokenizer, file, tokens, kinds)
    text: str = tokenizer.to_str()
    return text


def _byte_level(file: GgufFile, vocab: dict[str, int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.get("tokenizer.ggml.pre")
    if name not in RULES:
        raise CheckpointError(
            f"{file.path.name} splits text by the rule {name!r} (tokenizer.ggml.pre), which isn't known", hint=_OTHER_TOKENIZER
        )
    rule = RULES[name]
    stored = file.get("tokenizer.ggml.merges", [])
    if not isinstance(stored, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in stored):
        raise CheckpointError(f"tokenizer.ggml.merges of {file.path.name} isn't a list of pairs", hint=_AGAIN)
    cuts = ((merge, merge.index(" ", 1)) for merge in stored)
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    missing = next((pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()), None)
    if missing:
        raise CheckpointError(f"{file.path.name} merges {missing[0]!r} and {missing[1]!r}, no tokens of its own", hint=_AGAIN)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole_first))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str], vocab: dict[str, int], kinds: list[int]) -> Any:
    """Merge the neighbours whose token has the highest score, again and again: BPE whose merges are ordered by score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores of {file.path.name} isn't a list of {len(tokens)} numbers", hint=_AGAIN)
    found = [
        (-scores[number], number, len(token[:cut]), token[:cut], token[cut:])
        for number, token in enumerate(tokens)
        if kinds[number] not in _WHOLE
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(found)]
    unknown = next((number for number, kind in enumerate(kinds) if kind == Kind.UNKNOWN), special_token(file, "unknown"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=Kind.BYTE in kinds,
        )
    )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _frame(tokenizer: Any, file: GgufFile, tokens: list[str], kind: str) -> None:
    """Put the begin- and end-of-sequence tokens around a text, where the file or llama.cpp's defaults ask for them."""
    from tokenizers import processors

    begins = kind == "llama" or RULES[file.get("tokenizer.ggml.pre")].bos
    begin, end = special_token(file, "bos"), special_token(file, "eos")
    before = [begin] if file.flag("tokenizer.ggml.add_bos_token", begins) and begin is not None else []
    behind = [end] if file.flag("tokenizer.ggml.add_eos_token", False) and end is not None else []
    if before or behind:
        single = [f"{tokens[number]}:0" for number in before] + ["$A:0"] + [f"{tokens[number]}:0" for number in behind]
        around = [(tokens[number], number) for number in {*before, *behind}]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)


def _add_tokens(tokenizer: Any, file: GgufFile, tokens: list[str], kinds: list[int]) -> None:
    """Keep control tokens and the maker's own tokens whole wherever they stand in a text."""
    from tokenizers import AddedToken

    control = {number for number, kind in enumerate(kinds) if kind in (Kind.CONTROL, Kind.UNKNOWN)}
    strips = any(part in file.text("general.name", "").lower() for part in ("phi-3", "phi3"))  # as llama.cpp decides it
    stays = {"<unk>", "<s>", "<|endoftext|>"}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=number in control, normalized=False, rstrip=strips and token not in stays)
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if number in control or kind == Kind.USER_DEFINED
        ]
    )


def gguf_special_text(file: GgufFile) -> dict[str, str | None]:
    """Return the texts of the begin- and end-of-sequence tokens and the chat template, each if the file has it."""
    tokens = read_tokens(file)
    names = {f"{name}_token": special_token(file, name) for name in ("bos", "eos")}
    texts = {name: None if number is None or not tokens else tokens[number] for name, number in names.items()}
    template = file.get("tokenizer.chat_template")
    return {**texts, "chat_template": template if isinstance(template, str) and template else None}
