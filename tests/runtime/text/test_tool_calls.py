"""Calls of tools: the form is the template's, and pieces of text make no difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime import Request
from medusa_deploy.runtime.errors import PromptError, TemplateError
from medusa_deploy.runtime.text.encoder import PromptEncoder
from medusa_deploy.runtime.text.tool_calls import CallForm, CallReader, ToolCall
from support.fake_executor import fake_session
from support.text import TEMPLATE

pytest.importorskip("tokenizers")
pytest.importorskip("minijinja")

ASK = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
_JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
_FORMS = {
    f"{{{{ tools | tojson }}}}<tool_call>\n{_JSON}\n</tool_call>": CallForm(),
    f"<tool_call>{_JSON}</tool_call>": CallForm("", ""),
    '<tool_call>{"arguments": {{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}\n</tool_call>': CallForm(
        "", "\n", ("arguments", "name")
    ),
    f"[TOOL_CALLS]{_JSON}": None,
    "<tool_call><function={{ c.function.name }}></function></tool_call>": None,
    "{{ raise_exception('no calls') }}": None,
    "": None,
}


def _encoder(folder: Path, template: str) -> PromptEncoder:
    session = fake_session(text_folder=folder)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return session.encoder


@pytest.mark.parametrize("written", _FORMS, ids=range(len(_FORMS)))
def test_the_template_says_how_a_call_is_written(written: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}" + written + "{% endfor %}{% endfor %}"
    encoder, form = _encoder(tmp_path, template), _FORMS[written]
    if form is None:
        with pytest.raises(TemplateError, match="known form"):
            CallForm.of(encoder)
    else:
        assert CallForm.of(encoder) == form


def test_tools_are_shown_by_the_template_or_refused(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, TEMPLATE)
    with pytest.raises(TemplateError, match="takes no tools") as raised:
        encoder.encode(Request(messages=ASK, tools=TOOLS))
    assert raised.value.argument == "tools"
    (tmp_path / "other").mkdir()
    encoder = _encoder(tmp_path / "other", "{{ tools[0].function.name if tools }}" + TEMPLATE)
    assert encoder.render(ASK, TOOLS) == "f" + encoder.render(ASK)
    with pytest.raises(PromptError, match="without messages"):
        encoder.encode(Request("x", tools=TOOLS))


@pytest.mark.parametrize("tools", [[{"a": object()}], [{"a": "\ud800"}], [{1: "a"}]], ids=["object", "surrogate", "key"])
def test_tools_are_json(tools: Sequence[Mapping[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        _encoder(tmp_path, TEMPLATE).render(ASK, tools)


def _read(pieces: Sequence[str]) -> tuple[str, list[ToolCall]]:
    reader, text = CallReader(), ""
    for piece in pieces:
        text += reader.push(piece)[0]
    return text + reader.flush(), reader.calls


_parts = st.lists(
    st.sampled_from([
        '<tool_call>\n{"name": "f", "arguments": {"a": "</tool"}}\n</tool_call>',
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "<tool_call>no JSON</tool_call>", "<tool_call>", "</tool_call>", "<tool", "\n", " ", "text", "<", '{"name": "f"}',
    ]),
    max_size=6,
).map("".join)  # fmt: skip


@given(text=_parts, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_pieces_make_no_difference(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    assert _read([text[a:b] for a, b in pairwise(places)]) == _read([text])


def test_text_and_calls() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert _read([f"Let me see.\n{call}\n{call}\n"]) == ("Let me see.", [ToolCall("f", '{"a": 1}')] * 2)
    assert _read([call]) == ("", [ToolCall("f", '{"a": 1}')])
    assert _read(["no call <tool_"]) == ("no call <tool_", [])
    assert _read([call[:-5]]) == (call[:-5], [])
    broken = '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'
    assert _read([broken]) == (broken, [])
    assert json.loads(_read([call])[1][0].arguments) == {"a": 1}
