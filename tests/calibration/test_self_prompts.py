"""Prompts that a model writes: what is kept, what isn't, and where a template can't be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("minijinja")

from medusa_deploy.calibration.answers.answers import Answer, Question
from medusa_deploy.calibration.answers.self_prompts import CATEGORY, write_self_prompts
from medusa_deploy.runtime.errors import TrainingError
from medusa_deploy.runtime.text.encoder import PromptEncoder
from medusa_deploy.runtime.text.prompts import read_prompts
from support.text import TEMPLATE, encode, write_text_files
from support.tiny import EOS, VOCAB


class Writer:
    """Says the given texts, one a question."""

    weights = "digest"

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[Answer]:
        self.asked += questions
        for index, tokens in enumerate(self.texts[: len(questions)]):
            yield Answer(index, np.array(tokens[:max_new_tokens]), np.zeros((len(tokens), 1), np.float16))


def encoder_of(folder: Path, template: str | None = TEMPLATE) -> PromptEncoder:
    text = write_text_files(folder, eos_token_ids=(EOS,))
    if template is None:
        text = replace(text, chat_template=None)
    else:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return PromptEncoder(text, VOCAB, folder.joinpath)


def test_what_is_new_whole_and_long_enough_is_kept(tmp_path: Path) -> None:
    said = ["How do I bake bread?;ignored", "short;", "how do i  bake bread?;", "A question without end", "Something held out;"]
    texts = [encode(text) for text in said] + [[]] + [[*encode("What is the moon?"), EOS]]
    writer, output = Writer(texts), tmp_path / "prompts.jsonl"
    done: list[int] = []
    known = ["something  HELD out"]
    kept = write_self_prompts(writer, encoder_of(tmp_path), len(texts), output, seed=5, known=known, progress=done.append)
    assert kept == 2
    lines = read_prompts(output)
    assert [line.messages[0]["content"] for line in lines if line.messages] == ["How do I bake bread?", "What is the moon?"]
    assert {line.category for line in lines} == {CATEGORY}
    assert [question.seed for question in writer.asked] == [5 + index for index in range(len(texts))]
    assert all(list(question.prompt) == encode("user:") for question in writer.asked)
    assert done == list(range(1, len(texts) + 1))
    assert json.loads(output.read_text("utf-8").splitlines()[0])["messages"][0]["role"] == "user"


@pytest.mark.parametrize("template", [None, "{{ messages[0].content | upper }}", "{{ messages[0].content }};"])
def test_a_template_that_does_not_show_where_a_user_speaks_is_refused(tmp_path: Path, template: str | None) -> None:
    writer = Writer([])
    with pytest.raises(TrainingError, match="template") as caught:
        write_self_prompts(writer, encoder_of(tmp_path, template), 4, tmp_path / "prompts.jsonl")
    assert "--self-prompts" in caught.value.hint
    assert not writer.asked and not (tmp_path / "prompts.jsonl").exists()
