"""Writes the tokenizer, the chat template and the special ids of a checkpoint as files that the runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.files.manifest import TextFacts
from .backbone import transformers_errors
from .chat_template import differences
from .gguf_file.metadata import GgufFile
from .gguf_file.tokenizer import gguf_special_text, gguf_tokenizer
from .gguf_file.tokens import stop_tokens
from .model_folder import find_model, stop_ids, token_ids
from .tokenizer_files import has_tokenizer, read_tokenizer

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def write_text_files(source: Path, config: Any, output: Path) -> tuple[TextFacts, list[str]]:
    """Write ``tokenizer.json`` and ``chat_template.jinja`` of a model into ``output`` if it has them. Return them, and warnings.

    ``config``: the model's config, as transformers read it.

    Raises:
        CheckpointError: the tokenizer can't be read, or not be written as a ``tokenizer.json`` that does the same.
        MissingDependencyError: a package that reads the tokenizer's format isn't installed.
    """
    folder, gguf = find_model(source)
    if gguf is not None:
        return _write_gguf_text(GgufFile(folder / gguf), output)
    eos = eos_token_ids(folder, config)
    if not has_tokenizer(folder):
        return TextFacts(eos_token_ids=eos), ["the model has no tokenizer: the bundle takes token ids only"]
    with transformers_errors(folder):
        read = read_tokenizer(folder, config)
    (output / TOKENIZER).write_bytes(read.content)
    tokenizer, warnings = read.tokenizer, list(read.warnings)
    if tokenizer.eos_token_id is not None:
        eos = tuple(sorted({*eos, int(tokenizer.eos_token_id)}))
    special = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        others = sorted(set(template) - {"default"})
        template = template.get("default")
        warnings.append(f"of several chat templates the bundle has the one named default, not {', '.join(others)}")
    return TextFacts(TOKENIZER, _write_template(template, special, output, warnings), eos, special), warnings


def _write_template(template: str | None, special: dict[str, str], output: Path, warnings: list[str]) -> str | None:
    """Write the chat template if it renders here as transformers renders it. Returns the file's name; None adds a warning."""
    if not template:
        return None
    if found := differences(template, special):
        warnings.append(f"the bundle has no chat template, because this program renders it otherwise than transformers: {found}")
        return None
    (output / CHAT_TEMPLATE).write_text(template, "utf-8", newline="")
    return CHAT_TEMPLATE


def _write_gguf_text(file: GgufFile, output: Path) -> tuple[TextFacts, list[str]]:
    """Write the text files of a GGUF file. What lies beside it isn't read."""
    text, found, warnings = gguf_tokenizer(file), gguf_special_text(file), list[str]()
    if text is not None:
        (output / TOKENIZER).write_text(text, "utf-8")
    special = {name: token for name, token in found.items() if token is not None and name != "chat_template"}
    template = _write_template(found["chat_template"], special, output, warnings)
    return TextFacts(TOKENIZER if text else None, template, stop_tokens(file), special), warnings


def eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Collect the end-of-sequence ids of the model's config and generation config.

    Raises:
        CheckpointError: a generation config that can't be read, or an id that is none.
    """
    return tuple(sorted({*token_ids(config.to_dict().get("eos_token_id"), "config.json"), *stop_ids(folder)}))
