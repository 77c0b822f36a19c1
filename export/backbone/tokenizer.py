"""Writes the tokenizer, the chat template and the special ids of a checkpoint as files that the runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...runtime.files.manifest import TextFacts
from .backbone import locate, transformers_errors
from .model_folder import NO_CODE, stop_ids, token_ids

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def write_text_files(source: Path, config: Any, output: Path) -> TextFacts:
    """Write ``tokenizer.json`` and ``chat_template.jinja`` of a model into ``output`` if it has them.

    ``config``: the model's config, as transformers read it.

    Raises:
        CheckpointError: transformers can't load the model's tokenizer.
    """
    folder, options = locate(source)
    eos = eos_token_ids(folder, config)
    if not options and not any((folder / name).exists() for name in _SOURCES):
        return TextFacts(eos_token_ids=eos)
    from transformers import AutoTokenizer

    with transformers_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE, **options)
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


def eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Collect the end-of-sequence ids of the model's config and generation config.

    Raises:
        CheckpointError: a generation config that can't be read, or an id that is none.
    """
    return tuple(sorted({*token_ids(config.to_dict().get("eos_token_id"), "config.json"), *stop_ids(folder)}))
