"""Converts a SentencePiece model to a ``tokenizers.Tokenizer`` that reads and writes text exactly as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.errors import CheckpointError
from .sentencepiece_check import HINT, check_conversion, require_sentencepiece

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_SPACE = "▁"
CLASSES = ("LlamaTokenizer", "GemmaTokenizer")
"""Tokenizer classes whose ids are the model's own."""


def convert(path: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Convert the model of a folder whose ``tokenizer_config.json`` holds ``settings``. Return it and its special tokens by name.

    ``settings``: ``legacy`` (the default, as in transformers) puts the model's leading space behind special tokens, too;
    ``add_bos_token`` and ``add_eos_token``.

    Raises:
        CheckpointError: the model has a property that no tokenizer.json expresses.
        MissingDependencyError: the model normalises text, and ``sentencepiece``, which can compare the result, is missing.
    """
    from tokenizers import AddedToken, decoders, processors

    model = _read(path)
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    legacy = settings.get("legacy", True) is not False
    _refuse(path, model, kinds, legacy)
    if model.normalizer_spec.precompiled_charsmap:  # too large a table to be sure of
        require_sentencepiece(path)
    tokenizer = _model(model, pieces, kinds)
    _set_normalizer(tokenizer, model.normalizer_spec, legacy=legacy)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, normalized=False, special=kind != _USER_DEFINED)])
    check_conversion(path, tokenizer)
    ids = {name: getattr(model.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    names = {f"{name}_token": pieces[index] for name, index in ids.items() if 0 <= index < len(pieces)}
    around = {"bos": settings.get("add_bos_token", True), "eos": settings.get("add_eos_token", False)}
    given = {name: _literal(settings.get(f"{name}_token"), names.get(f"{name}_token")) for name, add in around.items() if add}
    used = {name: token for name, token in given.items() if token is not None and tokenizer.token_to_id(token) is not None}
    template = [used.get("bos"), "$A", used.get("eos")]
    tokenizer.post_processor = processors.TemplateProcessing(
        [part for part in template if part is not None],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used.values()],
    )
    return tokenizer, names


def _literal(token: Any, default: str | None) -> str | None:
    if isinstance(token, dict):
        return str(token["content"])
    return default if token is None else str(token)


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.utils import sentencepiece_model_pb2_new as proto

    try:
        return proto.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}", hint="download the file again") from None


def _refuse(path: Path, model: Any, kinds: list[int], legacy: bool) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    reasons = {
        f"its model type is {trainer.model_type}": trainer.model_type not in (_UNIGRAM, _BPE),
        "it puts spaces behind words": trainer.treat_whitespace_as_suffix,
        "it leaves spaces as they are": not normalizer.escape_whitespaces,
        "it changes text when it decodes": model.denormalizer_spec.precompiled_charsmap,
        "it has unused pieces": trainer.model_type == _BPE and _UNUSED in kinds,
        "it puts a space in front of texts and has user-defined pieces": legacy
        and normalizer.add_dummy_prefix
        and _USER_DEFINED in kinds,
        "it drops spaces at the beginning and puts one in front of the first word alone": not legacy
        and normalizer.add_dummy_prefix
        and normalizer.remove_extra_whitespaces,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(f"{path} can't be converted exactly to a tokenizer.json: {reason}", hint=HINT)


def _model(model: Any, pieces: list[str], kinds: list[int]) -> Any:
    from tokenizers import Tokenizer, models

    spec = model.trainer_spec
    if spec.model_type == _UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in model.pieces]
        return Tokenizer(models.Unigram(scored, spec.unk_id, spec.byte_fallback))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    normal = {piece.piece: piece.score for piece, kind in zip(model.pieces, kinds, strict=True) if kind == 1}
    # The model joins the neighbours that make the piece with the highest score, whichever two they are.
    merges = [
        (-score, index, piece[:index], piece[index:])
        for piece, score in normal.items()
        for index in range(1, len(piece))
        if piece[:index] in normal and piece[index:] in normal
    ]
    merges.sort(key=lambda merge: merge[:2])
    joined = [(left, right) for _, _, left, right in merges]
    return Tokenizer(models.BPE(vocab, joined, unk_token=pieces[spec.unk_id], fuse_unk=True, byte_fallback=spec.byte_fallback))


def _set_normalizer(tokenizer: Any, spec: Any, *, legacy: bool) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    parts: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        parts += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and legacy:
        parts.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", _SPACE)])
    if spec.add_dummy_prefix and not legacy:
        # Metaspace adds nothing to a text that begins with its own mark. No text has spaces left, so a space is always added.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
            ]
        )
