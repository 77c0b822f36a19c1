"""Compares a converted tokenizer with the SentencePiece model that it was made of, on texts and on pieces in random order."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

from ...runtime.errors import CheckpointError, MissingDependencyError

HINT = "put a tokenizer.json into the folder, or take the tokenizer's files out: the bundle then takes token ids"

_TEXTS = (
    "Hello, how are you today?", " leading and trailing ", "a  b   c    d", "", " ", "tab\tand\nlines\n\n",
    "0123456789 3.14 1,000", "def f(x):\n    return x[0] + {'a': 1}\n", "Grüße aus Köln – naïve café", "日本語のテキスト。",
    "Привет, мир!", "مرحبا بالعالم", "नमस्ते दुनिया", "안녕하세요", "👋🏽 🦊", "ﬁ ½ Å ①", "<tag>x</tag> &amp; $x^2$",
    "e\u0301 and \u00a0 and \u200b", "don't I'll we're", "https://example.org/a?b=c&d=%20",
    "aaaaaaaaaa -------- ========",
)  # fmt: skip
_ROUNDS = 400
_PIECES = 6


def require_sentencepiece(model: Path) -> None:
    """Refuse to convert ``model`` where nothing can tell whether the result is exact.

    Raises:
        MissingDependencyError: ``sentencepiece`` isn't installed.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise MissingDependencyError(
            f"the conversion of {model} must be compared with the package sentencepiece, which isn't installed",
            hint="pip install sentencepiece",
        )


def check_conversion(model: Path, tokenizer: Any) -> None:
    """Refuse a converted tokenizer that reads some text otherwise than ``model``; without ``sentencepiece`` nothing is compared.

    Raises:
        CheckpointError: a text has other ids. The message has it.
    """
    if importlib.util.find_spec("sentencepiece") is not None and (found := disagreement(model, tokenizer)):
        raise CheckpointError(f"{model} can't be converted exactly to a tokenizer.json: {found}", hint=HINT)


def disagreement(model: Path, tokenizer: Any) -> str | None:
    """Return what the first text with different ids becomes in both; None if there is none.

    ``tokenizer``: a ``tokenizers.Tokenizer``. Its special tokens are left out: only a converted tokenizer reads them in a text.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in (*_TEXTS, *_mixtures(processor)):
        if any(token in text for token in special):
            continue
        wanted, got = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if wanted != got:
            return f"{text!r} has the ids {wanted[:12]} by SentencePiece and {got[:12]} when converted"
    return None


def _mixtures(processor: Any) -> list[str]:
    """Return texts of the model's own pieces in random order: they try the order of merges. The seed is fixed."""
    no_text = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    ids = [index for index in range(processor.vocab_size()) if not any(test(index) for test in no_text)]
    pieces = [processor.id_to_piece(index).replace("▁", " ") for index in ids]
    draw = random.Random(0)  # noqa: S311 no secret
    return ["".join(draw.choices(pieces, k=_PIECES)) for _ in range(_ROUNDS)] if pieces else []
