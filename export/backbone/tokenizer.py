"""Writes the tokenizer, the chat template and the special ids of a checkpoint as files that the runtime reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...runtime.files.manifest import TextFacts
from .backbone import locate, transformers_errors
from .chat_template import differences
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
    folder, options = locate(source)
    eos = eos_token_ids(folder, config)
    if not options and not has_tokenizer(folder):
        return TextFacts(eos_token_ids=eos), ["the model has no tokenizer: the bundle takes token ids only"]
    with transformers_errors(folder):
        read = read_tokenizer(folder, config, options)
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
    if template and (found := differences(template, special)):
        warnings.append(f"the bundle has no chat template, because this program renders it otherwise than transformers: {found}")
        template = None
    if template:
        (output / CHAT_TEMPLATE).write_text(template, "utf-8", newline="")
    return TextFacts(TOKENIZER, CHAT_TEMPLATE if template else None, eos, special), warnings


def eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """Collect the end-of-sequence ids of the model's config and generation config."""
    found: set[int] = set()
    settings = [config.to_dict()]
    path = folder / "generation_config.json"
    if path.exists():
        settings.append(json.loads(path.read_text("utf-8")))
    for entry in settings:
        value = entry.get("eos_token_id")
        found.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(found))
