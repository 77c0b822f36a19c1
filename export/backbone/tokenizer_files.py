"""Reads a checkpoint's tokenizer as the bytes of a ``tokenizer.json``: its own file, or an exact conversion."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import CheckpointError
from .sentencepiece_check import HINT, check_conversion, require_sentencepiece
from .sentencepiece_model import CLASSES, convert

_OWN = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
_MAX_BYTES = 256 << 20


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


def read_tokenizer(folder: Path, config: Any, options: dict[str, Any]) -> ReadTokenizer:
    """Read the tokenizer of a folder. ``options`` select a GGUF file in it.

    Raises:
        CheckpointError: the file is damaged, or no ``tokenizer.json`` does what the folder's tokenizer does.
        MissingDependencyError: a SentencePiece model's conversion must be compared with ``sentencepiece``, which isn't installed.
    """
    if not options and (folder / _OWN).exists():
        return _own(folder)
    settings = {} if options else _settings(folder)
    if settings.get("auto_map"):
        code = settings["auto_map"]
        raise CheckpointError(f"the tokenizer of {folder} is Python code of its own ({code}), which is never run", hint=HINT)
    model = None if options else _sentencepiece_model(folder)
    if model is not None and str(settings.get("tokenizer_class", CLASSES[0])).removesuffix("Fast") in CLASSES:
        return _from_sentencepiece(folder, model, settings)
    return _converted(folder, config, options, settings, model)


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
    tokenizer, names = convert(model, settings)
    with tempfile.TemporaryDirectory() as made:
        beside = Path(made)
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, beside / name)
        (beside / _CONFIG).write_text(json.dumps({**names, **settings}), "utf-8")
        tokenizer.save(str(beside / _OWN))
        return _own(beside)


def _converted(folder: Path, config: Any, options: dict[str, Any], settings: dict[str, Any], model: Path | None) -> ReadTokenizer:
    """Let transformers convert other formats. A SentencePiece model is then asked itself whether the result does the same."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model is not None:
        require_sentencepiece(model)
    arguments = {} if options else {"config": config, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options, **arguments)
    name = settings.get("tokenizer_class") or type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{name} of {folder} is a tokenizer in Python only; it has no tokenizer.json", hint=HINT)
    if not options and not _has(folder, _VOCABULARIES):
        raise CheckpointError(f"{folder} names the tokenizer {name}, but has no vocabulary", hint=HINT)
    if not options and model is None and type(tokenizer) is PreTrainedTokenizerFast and not (folder / "tekken.json").exists():
        raise CheckpointError(
            f"{folder} has a vocabulary, but nothing says how its tokenizer splits text (tokenizer_class: {name})", hint=HINT
        )
    if model is not None:
        check_conversion(model, tokenizer.backend_tokenizer)
    return ReadTokenizer(tokenizer.backend_tokenizer.to_str().encode(), tokenizer)


def _sentencepiece_model(folder: Path) -> Path | None:
    """Return the folder's SentencePiece model. Other ``.model`` files hold lines of text, which never begin with a newline."""
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            if file.read(1) == b"\n":
                return path
    return None
