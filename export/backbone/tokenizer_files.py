"""Reads a checkpoint's tokenizer as the bytes of a ``tokenizer.json``: its own file, or an exact conversion."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import CheckpointError, MissingDependencyError
from .model_folder import NO_CODE
from .sentencepiece_check import HINT, check_conversion, require_sentencepiece
from .sentencepiece_model import CLASSES, convert

_OWN = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
_MAX_BYTES = 256 << 20
_TEKKEN = "tekken.json"
_TEKKEN_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class ReadTokenizer:
    """``content``: the bytes of a ``tokenizer.json``. ``tokenizer``: transformers' object, which knows names and templates."""

    content: bytes
    tokenizer: Any
    warnings: tuple[str, ...] = ()


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder has any file of a tokenizer."""
    return _has(folder, (_OWN, _CONFIG, *_VOCABULARIES))


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def read_tokenizer(folder: Path, config: Any) -> ReadTokenizer:
    """Read the tokenizer of a folder.

    Raises:
        CheckpointError: the file is damaged, or no ``tokenizer.json`` does what the folder's tokenizer does.
        MissingDependencyError: a SentencePiece model's conversion must be compared with ``sentencepiece``, which isn't installed.
    """
    if (folder / _OWN).exists():
        return _own(folder)
    settings = _settings(folder)
    if settings.get("auto_map"):
        code = settings["auto_map"]
        raise CheckpointError(f"the tokenizer of {folder} is Python code of its own ({code}), which is never run", hint=HINT)
    if (folder / _TEKKEN).exists():
        return _from_tekken(folder, settings)
    model = _sentencepiece_model(folder)
    if model is not None and str(settings.get("tokenizer_class", CLASSES[0])).removesuffix("Fast") in CLASSES:
        return _from_sentencepiece(folder, model, settings)
    return _converted(folder, config, settings, model)


def _own(folder: Path) -> ReadTokenizer:
    """Take the folder's own file, byte for byte unless its settings add tokens to it.

    The class that the settings name isn't asked: transformers 5 builds its classes' pipelines anew and leaves out what they
    don't know.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / _OWN
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, over the limit of {_MAX_BYTES}", hint=HINT)
    content = path.read_bytes()
    try:
        own = Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001 tokenizers raises nothing more specific
        raise CheckpointError(f"{path} is not a tokenizer: {error}", hint="download the file again") from None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    before, after = (_added(each) for each in (own, tokenizer.backend_tokenizer))
    warnings = list(_unused_settings(folder))
    if before != after:
        changed = [token["content"] for index, token in after.items() if before.get(index) != token]
        own.add_tokens([_token(after[index]) for index in sorted(after) if index not in before])
        if _added(own) != after:
            raise CheckpointError(
                f"{_CONFIG} gives added tokens other ids or properties than {path}, such as {changed[:3]}", hint=HINT
            )
        warnings.append(f"{_OWN} lacks {len(changed)} tokens that its settings add, such as {changed[0]!r}: they were added")
        content = own.to_str().encode()
    return ReadTokenizer(content, tokenizer, tuple(warnings))


def _added(tokenizer: Any) -> dict[int, dict[str, Any]]:
    """Return the added tokens by their ids, with all their properties."""
    return {index: token.__getstate__() for index, token in sorted(tokenizer.get_added_tokens_decoder().items())}


def _token(properties: dict[str, Any]) -> Any:
    from tokenizers import AddedToken

    return AddedToken(**properties)


def _unused_settings(folder: Path) -> list[str]:
    if _settings(folder).get("split_special_tokens"):
        return [f"{_CONFIG} has split_special_tokens, which a bundle ignores: literals of special tokens become their ids"]
    return []


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", hint="download the file again") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is a {type(settings).__name__}, not an object", hint="download the file again")
    return settings


def _from_sentencepiece(folder: Path, model: Path, settings: dict[str, Any]) -> ReadTokenizer:
    """Convert a SentencePiece model, then go on as if the result were the folder's own file."""
    return _as_own(folder, *convert(model, settings), settings)


def _from_tekken(folder: Path, settings: dict[str, Any]) -> ReadTokenizer:
    """Let transformers convert Mistral's format, whether mistral-common is installed or not. A prompt begins with ``<s>``."""
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import MistralConverter

    tokenizer = MistralConverter(str(folder / _TEKKEN)).converted()
    names = {name: token for name, token in _TEKKEN_NAMES.items() if tokenizer.token_to_id(token) is not None}
    bos = tokenizer.token_to_id(_TEKKEN_NAMES["bos_token"])
    if bos is not None:
        around = [(_TEKKEN_NAMES["bos_token"], bos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=[f"{around[0][0]}:0", "$A:0"], special_tokens=around)
    return _as_own(folder, tokenizer, names, settings)


def _as_own(folder: Path, tokenizer: Any, names: dict[str, Any], settings: dict[str, Any]) -> ReadTokenizer:
    """Read a converted tokenizer as the folder's own file. ``names``: of special tokens, where the settings have none."""
    with tempfile.TemporaryDirectory() as made:
        beside = Path(made)
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, beside / name)
        (beside / _CONFIG).write_text(json.dumps({**names, **settings}), "utf-8")
        tokenizer.save(str(beside / _OWN))
        return _own(beside)


def _converted(folder: Path, config: Any, settings: dict[str, Any], model: Path | None) -> ReadTokenizer:
    """Let transformers convert other formats. A SentencePiece model is then asked itself whether the result does the same."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model is not None:
        require_sentencepiece(model)
    if _ranks(folder) and importlib.util.find_spec("tiktoken") is None:
        raise MissingDependencyError(
            f"transformers reads the vocabulary of {folder} with the package tiktoken, which isn't installed",
            hint=f"pip install tiktoken, or {HINT}",
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, **NO_CODE)
    name = settings.get("tokenizer_class") or type(tokenizer).__name__
    ranks = _ranks(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{name} of {folder} is a tokenizer in Python only; it has no tokenizer.json", hint=HINT)
    if not _has(folder, _VOCABULARIES):
        raise CheckpointError(f"{folder} names the tokenizer {name}, but has no vocabulary", hint=HINT)
    if (model is None and type(tokenizer) is PreTrainedTokenizerFast) or (ranks and name.removesuffix("Fast") != CLASSES[0]):
        raise CheckpointError(
            f"{folder} has a vocabulary, but nothing says how its tokenizer splits text (tokenizer_class: {name})", hint=HINT
        )
    if model is not None:
        check_conversion(model, tokenizer.backend_tokenizer)
    _check_vocabulary(folder, ranks, tokenizer.backend_tokenizer.get_vocab())
    return ReadTokenizer(tokenizer.backend_tokenizer.to_str().encode(), tokenizer)


def _ranks(folder: Path) -> dict[bytes, int]:
    """Read tiktoken's format: lines of a token's bytes in base64 and its id. Empty where the folder has none."""
    paths = [*sorted(folder.glob("*.tiktoken")), *sorted(folder.glob("*.model"))]
    found = [path for path in paths if not _is_sentencepiece(path)]
    if not found:
        return {}
    try:
        lines = [line.split() for line in found[0].read_bytes().splitlines() if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{found[0]} is no vocabulary of tiktoken: {error}", hint=HINT) from None


def _check_vocabulary(folder: Path, ranks: dict[bytes, int], converted: dict[str, int]) -> None:
    """Refuse a conversion that has read another file than the vocabulary, or none: transformers' classes know names of files.

    Raises:
        CheckpointError: tokens of the file are missing, or have other ids.
    """
    wanted = {_byte_level(token): rank for token, rank in ranks.items()}
    vocabulary = folder / "vocab.json"
    if not ranks and vocabulary.exists():
        listed = json.loads(vocabulary.read_text("utf-8"))
        wanted = {token: rank for token, rank in listed.items() if isinstance(rank, int)} if isinstance(listed, dict) else {}
    lost = [token for token, rank in wanted.items() if converted.get(token) != rank]
    if lost:
        raise CheckpointError(
            f"transformers' tokenizer of {folder} lacks {len(lost)} of {len(wanted)} tokens of its file, such as {lost[0]!r}",
            hint=HINT,
        )


def _byte_level(token: bytes) -> str:
    """Write bytes as byte-level BPE does: printable ones as themselves, the others in order from U+0100 on."""
    return "".join(_BYTES[byte] for byte in token)


def _is_printable(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174


_HIDDEN = [byte for byte in range(256) if not _is_printable(byte)]
_BYTES = [chr(byte) if _is_printable(byte) else chr(256 + _HIDDEN.index(byte)) for byte in range(256)]


def _is_sentencepiece(path: Path) -> bool:
    """Tell a SentencePiece model from lines of text, which never begin with a newline."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"


def _sentencepiece_model(folder: Path) -> Path | None:
    """Return the folder's SentencePiece model."""
    return next((path for path in sorted(folder.glob("*.model")) if _is_sentencepiece(path)), None)
