"""Prompts that a verb runs on: a file's, the package's held-out ones, or random token ids where there is no tokenizer."""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.session import Session
    from ..runtime.text.encoder import PromptEncoder
    from ..runtime.text.prompts import PromptLine

DEFAULT_COUNT = 16
_LONGEST_RANDOM = 64


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--prompts`` and ``--count``."""
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSONL of prompts, messages or token ids (default: held-out chat prompts; random token ids without a tokenizer)",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help=f"use the first N prompts (default: all of FILE, or {DEFAULT_COUNT} of the others)"
    )


def prompts_for(session: Session, path: Path | None, count: int | None, seed: int = 0) -> list[list[int]]:
    """Read or make prompts as token ids.

    ``path`` is a prompt file; None takes the package's held-out prompts, or seeded random ids if the bundle has no tokenizer.
    The first ``count`` are taken; None takes all of a file and ``DEFAULT_COUNT`` of the others.

    Raises:
        PromptFileError: the file can't be read as prompts.
        PromptError: fewer prompts than ``count``, or one that isn't valid for this bundle.
    """
    from ..runtime.errors import PromptError

    if count is not None and count < 1:
        raise PromptError(f"asked for {count} prompts", hint="ask for at least one")
    if path is None and session.manifest.text.tokenizer is None:
        return random_prompts(
            session.manifest.backbone.vocab_size, session.manifest.limits.capacity, count or DEFAULT_COUNT, seed
        )
    if path is not None:
        from ..runtime.text.prompts import read_prompts

        lines, source = read_prompts(path), str(path)
        count = len(lines) if count is None else count
    else:
        lines, source = heldout_prompts(), "the held-out set"
        count = DEFAULT_COUNT if count is None else count
        if session.manifest.text.chat_template is None:
            lines = [_without_template(line) for line in lines]
    if count > len(lines):
        raise PromptError(f"asked for {count} prompts, {source} has {len(lines)}", hint=f"give --count {len(lines)} or less")
    return [session.encode(line.request()) for line in lines[:count]]


def heldout_prompts() -> list[PromptLine]:
    """The package's chat prompts that training never saw, in turns of their categories."""
    from ..runtime.text.prompts import read_prompts

    return read_prompts(packaged_prompts("heldout"))


def packaged_prompts(part: str) -> Path:
    """The package's prompt file for ``part``: ``train`` or ``heldout``."""
    from .. import calibration

    return Path(str(files(calibration) / "prompts" / f"{part}.jsonl"))


def heldout_prose(encoder: PromptEncoder) -> list[list[int]]:
    """The package's held-out paragraphs as token ids; none where the backbone has no tokenizer."""
    from .. import calibration

    if encoder.codec is None:
        return []
    paragraphs = (files(calibration) / "text" / "heldout.txt").read_text("utf-8").split("\n\n")
    return [encoder.codec.encode(paragraph.strip(), add_special_tokens=True) for paragraph in paragraphs]


def random_prompts(vocab_size: int, capacity: int, count: int, seed: int) -> list[list[int]]:
    """Make ``count`` prompts of 1 to 64 random token ids, at most a quarter of the capacity long."""
    import numpy as np

    rng = np.random.default_rng(seed)
    longest = max(1, min(_LONGEST_RANDOM, capacity // 4))
    return [rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def check_room(session: Session, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuse before the first step what would fail in the middle of a long run.

    Raises:
        CapacityError: a prompt and its answer don't fit into a slot.
    """
    from ..runtime.errors import CapacityError

    capacity = session.manifest.limits.capacity
    for index, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > capacity:
            raise CapacityError(
                f"prompt {index + 1}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the capacity of {capacity}",
                hint="lower --max-new-tokens, or take shorter prompts with --prompts",
            )


def _without_template(line: PromptLine) -> PromptLine:
    """The last message of a chat as a plain prompt, for a backbone that isn't a chat model."""
    if line.messages is None:
        return line
    return replace(line, prompt=line.messages[-1]["content"], messages=None)
