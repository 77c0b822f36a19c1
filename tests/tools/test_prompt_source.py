"""Where prompts come from: a file, the package's held-out set, or random ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_deploy.runtime.errors import CapacityError, PromptError, PromptFileError
from medusa_deploy.runtime.files.manifest import TextFacts
from medusa_deploy.runtime.session import Request
from medusa_deploy.tools.prompt_source import DEFAULT_COUNT, check_room, heldout_prompts, packaged_prompts, prompts_for
from support.records import manifest


class Speaker:
    """What prompts_for needs of a session: a manifest, and an encoding that shows what it was given."""

    def __init__(self, *, tokenizer: str | None = None, template: str | None = None) -> None:
        facts = manifest()
        self.manifest = SimpleNamespace(backbone=facts.backbone, limits=facts.limits, text=TextFacts(tokenizer, template))
        self.encoded: list[Request] = []

    def encode(self, request: Request) -> list[int]:
        self.encoded.append(request)
        return list(request.token_ids or [len(self.encoded)])


def source(session: Any, path: Path | None = None, count: int | None = None, seed: int = 0) -> list[list[int]]:
    return prompts_for(session, path, count, seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": [number, number]}) + "\n" for number in range(20)))
    return path


def test_a_file_comes_first_and_whole(file: Path):
    assert source(Speaker(), file) == [[number, number] for number in range(20)]


def test_count_takes_the_first_of_a_file(file: Path):
    assert source(Speaker(), file, 2) == [[0, 0], [1, 1]]


def test_more_than_a_file_has_is_refused(file: Path):
    with pytest.raises(PromptError, match="asked for 21 prompts, .* has 20"):
        source(Speaker(), file, 21)


def test_a_file_without_prompts_is_refused(tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(PromptFileError):
        source(Speaker(), path)


def test_without_a_file_the_heldout_chats_are_used():
    speaker = Speaker(tokenizer="tokenizer.json", template="chat_template.jinja")
    assert len(source(speaker)) == DEFAULT_COUNT
    assert [request.messages for request in speaker.encoded] == [line.messages for line in heldout_prompts()[:DEFAULT_COUNT]]


def test_without_a_template_the_last_message_is_the_prompt():
    speaker = Speaker(tokenizer="tokenizer.json")
    source(speaker, count=3)
    lines = heldout_prompts()[:3]
    assert [request.prompt for request in speaker.encoded] == [line.messages[-1]["content"] for line in lines if line.messages]
    assert all(request.messages is None for request in speaker.encoded)


def test_without_a_tokenizer_ids_are_random_seeded_and_valid():
    first, same, other = source(Speaker()), source(Speaker()), source(Speaker(), seed=1)
    assert first == same != other
    assert len(first) == DEFAULT_COUNT
    assert all(1 <= len(prompt) <= 64 and all(0 <= token < 128 for token in prompt) for prompt in first)
    assert len({len(prompt) for prompt in first}) > 3


@pytest.mark.parametrize("count", [0, -1])
def test_asking_for_no_prompts_is_refused(count: int):
    with pytest.raises(PromptError, match=f"asked for {count} prompts"):
        source(Speaker(), count=count)


def test_heldout_prompts_cover_many_categories_early_and_are_not_in_training():
    lines = heldout_prompts()
    assert len(lines) >= 100
    assert len({line.category for line in lines[:8]}) >= 6
    training = packaged_prompts("train").read_text("utf-8").splitlines()
    held = packaged_prompts("heldout").read_text("utf-8").splitlines()
    assert not {_text(line) for line in held} & {_text(line) for line in training}


def _text(line: str) -> str:
    return " ".join(message["content"] for message in json.loads(line)["messages"] if message["role"] == "user").casefold()


def test_room_is_checked_before_anything_runs():
    session: Any = Speaker()
    check_room(session, [[1] * 200], 56)
    with pytest.raises(CapacityError, match="prompt 2: 200 tokens and 57 new ones exceed the capacity of 256"):
        check_room(session, [[1], [1] * 200], 57)
