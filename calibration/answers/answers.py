"""Keeps a backbone's answers on disk: complete, never made twice, in a folder that says how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.errors import TrainingError
from ...runtime.files.bundle import write_whole
from ...runtime.files.json_file import read_json_file

DESCRIPTION = "data.json"
_SHARD = 128
_MAX_DESCRIPTION_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Question:
    """Asks for an answer to a prompt (token ids). ``temperature`` 0 is greedy."""

    prompt: Sequence[int]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Answers question ``question``: ``tokens`` int64 [n] as emitted, ``hidden`` float16 [n, H]; row i emitted token i."""

    question: int
    tokens: np.ndarray
    hidden: np.ndarray


class Answerer(Protocol):
    """Answers questions with a backbone. ``weights``: a digest of the backbone."""

    @property
    def weights(self) -> str: ...

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[Answer]:
        """Yield the answers, in any order. An end-of-sequence token is the last one of its answer."""
        ...


@dataclass(frozen=True, slots=True)
class DataDescription:
    """Identifies a data set: the prompts, the weights that answered, and the settings; one answer a prompt and temperature."""

    prompts_sha256: str
    prompts: int
    weights_sha256: str
    max_new_tokens: int
    temperatures: tuple[float, ...]
    seed: int


class AnswerFolder:
    """Takes answers one by one and writes them a shard at a time.

    Raises:
        TrainingError: the folder holds answers made otherwise, or its description is damaged.
        OutputError: it can't be written.
    """

    def __init__(self, folder: Path, description: DataDescription) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        described = json.loads(json.dumps(asdict(description)))
        path = folder / DESCRIPTION
        if path.exists() and _described(path) != described:
            raise TrainingError(f"{folder} holds answers of other prompts, weights or settings", hint="give another folder")
        text = json.dumps(described, indent=1) + "\n"
        write_whole(path, text.encode())
        # One pass keeps no shard in memory: hidden states are most of the data.
        lengths = {answer.question: len(answer.tokens) for shard in iter_shards(folder) for answer in shard}
        self.answered, self.tokens = set(lengths), sum(lengths.values())
        self._pending: list[Answer] = []

    def add(self, answer: Answer) -> None:
        """Keep an answer. It is on disk when its shard is full or after :meth:`flush`."""
        self._pending.append(answer)
        self.answered.add(answer.question)
        self.tokens += len(answer.tokens)
        if len(self._pending) == _SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the answers that aren't on disk yet."""
        if self._pending:
            _write_shard(self.folder, self._pending)
            self._pending = []


def iter_shards(folder: Path) -> Iterator[list[Answer]]:
    """Yield the answers on disk, a shard at a time."""
    for path in sorted(folder.glob("answers-*.npz")):
        with np.load(path) as arrays:
            question, length, tokens, hidden = (arrays[name] for name in ("question", "length", "tokens", "hidden"))
        ends = np.cumsum(length)
        yield [
            Answer(int(question[i]), tokens[ends[i] - length[i] : ends[i]], hidden[ends[i] - length[i] : ends[i]])
            for i in range(len(question))
        ]


def answers_in_order(folder: Path) -> list[list[int]]:
    """Return the token ids of every answer on disk, in the order of their questions."""
    found = {answer.question: answer.tokens.tolist() for shard in iter_shards(folder) for answer in shard}
    return [found[index] for index in sorted(found)]


def _described(path: Path) -> Any:
    return read_json_file(path, limit=_MAX_DESCRIPTION_BYTES, error=TrainingError, hint="give another folder")


def _write_shard(output: Path, answers: list[Answer]) -> None:
    index = len(list(output.glob("answers-*.npz")))
    arrays: dict[str, Any] = {
        "question": np.array([answer.question for answer in answers]),
        "length": np.array([len(answer.tokens) for answer in answers]),
        "tokens": np.concatenate([answer.tokens for answer in answers]),
        "hidden": np.concatenate([answer.hidden for answer in answers]),
    }
    path = output / f"answers-{index:05d}.npz"
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)
