"""Writes the tokenizer, the chat template and the special ids of a checkpoint as files that the runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.files.manifest import TextFacts
from .backbone import transformers_errors
from .gguf_file.metadata import GgufFile
from .gguf_file.tokenizer import gguf_special_text, gguf_tokenizer
from .gguf_file.tokens import stop_tokens
from .model_folder import NO_CODE, find_model, stop_ids, token_ids

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def write_text_files(source: Path, config: Any, output: Path) -> TextFacts:
    """Write ``tokenizer.json`` and ``chat_template.jinja`` of a model into ``output`` if it has them.

    ``config``: the model's config, as transformers read it.

    Raises:
        CheckpointError: transformers can't load the model's tokenizer.
    """
    folder, gguf = find_model(source)
    if gguf is not None:
        return _write_gguf_text(GgufFile(folder / gguf), output)
    eos = eos_token_ids(folder, config)
    if not any((folder / name).exists() for name in _SOURCES):
        return TextFacts(eos_token_ids=eos)
    from transformers import AutoTokenizer

    with transformers_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    (output / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        (output / CHAT_TEMPLATE).write_text(template, "utf-8")
    if tokenizer.eos_token_id is not None:
        eos = tuple(sorted({*eos, int(tokenizer.eos_token_id)}))
    return TextFacts(
        tokenizer=TOKENIZER,
        chat_template=CHAT_TEMPLATE if template else None,
        eos_token_ids=eos,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


def _write_gguf_text(file: GgufFile, output: Path) -> TextFacts:
    """Write the text files of a GGUF file. What lies beside it isn't read."""
    text = gguf_tokenizer(file)
    special = gguf_special_text(file)
    if text is not None:
        (output / TOKENIZER).write_text(text, "utf-8")
    if special["chat_template"]:
        (output / CHAT_TEMPLATE).write_text(special["chat_template"], "utf-8")
    return TextFacts(
        tokenizer=TOKENIZER if text else None,
        chat_template=CHAT_TEMPLATE if special["chat_template"] else None,
        eos_token_ids=stop_tokens(file),
        bos_token=special["bos_token"],
        eos_token=special["eos_token"],
    )


def eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Collect the end-of-sequence ids of the model's config and generation config.

    Raises:
        CheckpointError: a generation config that can't be read, or an id that is none.
    """
    return tuple(sorted({*token_ids(config.to_dict().get("eos_token_id"), "config.json"), *stop_ids(folder)}))
