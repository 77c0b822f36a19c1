"""Lets a chat model write prompts itself: given its template up to where a user speaks, it goes on as the user.

Source: Z. Xu et al., Magpie, arXiv 2406.08464, section 2.1. Such prompts are as varied as the data that the model was tuned on.
Few people could write that down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

from ...runtime.errors import TrainingError
from ...runtime.files.bundle import write_whole
from ...runtime.text.encoder import PromptEncoder
from .answers import Answerer, Question

CATEGORY = "self"
TEMPERATURE = 0.9
_MAX_TOKENS = 128
_MIN_CHARACTERS = 12
_MARK = "\u2997user speaks here\u2998"


def write_self_prompts(
    answerer: Answerer,
    encoder: PromptEncoder,
    tries: int,
    output: Path,
    *,
    seed: int = 0,
    known: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Let the backbone try to write ``tries`` prompts. Writes the new ones into a JSONL file and returns their number.

    Leaves out prompts that don't end within 128 tokens, prompts shorter than 12 characters, repetitions, and ``known`` texts (of
    prompts that must stay unseen, for instance).

    Raises:
        TrainingError: the backbone has no chat template that shows where a user speaks.
        OutputError: the file can't be written.
    """
    before, ends = _user_turn(encoder)
    questions = [Question(before, TEMPERATURE, seed + index) for index in range(tries)]
    seen = {_normal(text) for text in known}
    lines = []
    for done, answer in enumerate(answerer.answer(questions, _MAX_TOKENS), start=1):
        progress(done)
        tokens = answer.tokens.tolist()
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        text = "" if end is None else encoder.codec.decode(tokens[:end]).strip()
        if len(text) < _MIN_CHARACTERS or not text.replace("\n", " ").isprintable() or _normal(text) in seen:
            continue
        seen.add(_normal(text))
        lines.append(json.dumps({"messages": [{"role": "user", "content": text}], "category": CATEGORY}, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    write_whole(output, text.encode())
    return len(lines)


def _user_turn(encoder: PromptEncoder) -> tuple[list[int], set[int]]:
    """Return the token ids before a user's text, and the tokens that end it."""
    hint = "self-written prompts need a chat model: leave out --self-prompts"
    if encoder.text.chat_template is None or encoder.codec is None:
        raise TrainingError("the backbone has no chat template or no tokenizer", hint=hint)
    parts = encoder.render([{"role": "user", "content": _MARK}]).split(_MARK)
    if len(parts) != 2:
        raise TrainingError("the chat template doesn't show the user's message as it is", hint=hint)
    before, after = (encoder.codec.encode(part, add_special_tokens=False) for part in parts)
    if not before:
        raise TrainingError("the chat template has nothing before the user's message", hint=hint)
    return before, {*encoder.text.eos_token_ids, *after[:1]}


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
