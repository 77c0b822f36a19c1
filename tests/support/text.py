"""A tokenizer of one character a token, and a chat template, for bundles that speak text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from medusa_deploy.runtime.files.bundle import open_bundle, record_files
from medusa_deploy.runtime.files.manifest import MANIFEST_NAME, TextFacts
from support.tiny import VOCAB

SPECIAL = ("<pad>", "<s>", "</s>")
NAMES = ("pad_token", "bos_token", "eos_token")
LETTERS = [chr(32 + index) for index in range(95)] + [chr(0xC0 + index) for index in range(VOCAB - 95 - len(SPECIAL))]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }};{% endfor %}>"


def write_text_files(folder: Path, *, eos_token_ids: tuple[int, ...] = ()) -> TextFacts:
    """Write both files into ``folder`` and describe them as a manifest does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {token: index for index, token in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return TextFacts("tokenizer.json", "chat_template.jinja", eos_token_ids, dict(zip(NAMES, SPECIAL, strict=True)))


def text_bundle(source: Path, folder: Path) -> Path:
    """Copy the bundle ``source`` to ``folder`` and give it a tokenizer and a chat template."""
    shutil.copytree(source, folder)
    manifest = replace(open_bundle(folder).manifest, text=write_text_files(folder))
    (folder / MANIFEST_NAME).write_text(replace(manifest, files=record_files(folder)).to_json(), "utf-8")
    return folder


def encode(text: str) -> list[int]:
    """Token ids of plain letters."""
    return [len(SPECIAL) + LETTERS.index(letter) for letter in text]


def decode(ids: list[int]) -> str:
    """Text of token ids, special ones left out."""
    return "".join(LETTERS[token - len(SPECIAL)] for token in ids if token >= len(SPECIAL))
