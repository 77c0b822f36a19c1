"""Prompt files have three kinds of lines; errors name the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime.errors import PromptFileError
from medusa_deploy.runtime.text.prompts import PromptLine, read_prompts


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_all_three_kinds_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"prompt": "Once\u2028upon"}\r',
        "",
        "   ",
        '{"messages": [{"role": "user", "content": "Hi"}], "category": "talk"}',
        '{"token_ids": [0, 5]}',
    ]
    path = written(tmp_path, "\n".join(lines))
    assert read_prompts(path) == [
        PromptLine(prompt="Once\u2028upon"),
        PromptLine(messages=({"role": "user", "content": "Hi"},), category="talk"),
        PromptLine(token_ids=(0, 5)),
    ]


def test_a_line_becomes_a_request_with_options() -> None:
    request = PromptLine(token_ids=(1, 2), category="ids").request(max_new_tokens=7, ignore_eos=True)
    assert (request.prompt, request.messages, request.token_ids) == (None, None, (1, 2))
    assert request.max_new_tokens == 7 and request.ignore_eos


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '"a string"',
        "[]",
        "{}",
        '{"category": "writing"}',
        '{"prompt": "a", "token_ids": [1]}',
        '{"prompt": "a", "promt": "b"}',
        '{"prompt": ""}',
        '{"prompt": null}',
        '{"prompt": ["a"]}',
        '{"prompt": "a", "category": 3}',
        '{"messages": []}',
        '{"messages": "Hi"}',
        '{"messages": [{"role": "user"}]}',
        '{"token_ids": []}',
        '{"token_ids": "12"}',
        '{"token_ids": [1, -1]}',
        '{"token_ids": [1, true]}',
        '{"token_ids": [1.0]}',
        "[" * 100_000,
        b'{"prompt": "\xff"}',
    ],
    ids=lambda line: repr(line[:40]),
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, line: str | bytes) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = written(tmp_path, b'{"prompt": "fine"}\n\n' + raw + b"\n")
    with pytest.raises(PromptFileError) as caught:
        read_prompts(path)
    assert f"{path}, line 3" in caught.value.message and caught.value.hint


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(PromptFileError, match="holds no prompts"):
        read_prompts(written(tmp_path, content))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(PromptFileError, match="can't read"):
            read_prompts(path)


def test_sizes_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, '{"prompt": "a rather long prompt"}')
    monkeypatch.setattr("medusa_deploy.runtime.text.prompts.MAX_LINE_BYTES", 20)
    with pytest.raises(PromptFileError, match="line 1 has 34 bytes, over the limit of 20"):
        read_prompts(path)
    monkeypatch.setattr("medusa_deploy.runtime.text.prompts.MAX_FILE_BYTES", 10)
    with pytest.raises(PromptFileError, match="34 bytes, over the limit of 10"):
        read_prompts(path)
