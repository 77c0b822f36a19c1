"""Chat templates render as models ship them. A hostile or wrong one does no harm."""

from __future__ import annotations

import sys
import time
from datetime import datetime

import pytest

from medusa_deploy.runtime.errors import MissingDependencyError, PromptError, TemplateError
from medusa_deploy.runtime.text.template import MAX_TEMPLATE_CHARS, ChatTemplate, check_messages

pytest.importorskip("minijinja")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}{{- "tools!" }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
MARKS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": " Hello <b>\n"}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]


def test_chatml() -> None:
    assert ChatTemplate(CHATML).render(HELLO) == "<|im_start|>user\n Hello <b>\n<|im_end|>\n<|im_start|>assistant\n"


def test_llama3() -> None:
    text = ChatTemplate(LLAMA3, MARKS).render([{"role": "system", "content": " Be brief. "}, *HELLO])
    year = datetime.now().astimezone().year
    assert text == (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n{year}\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello <b><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral() -> None:
    template = ChatTemplate(MISTRAL, MARKS)
    assert template.render(TALK) == "<s>[INST] Hi [/INST]Yes?</s>[INST] Why? [/INST]"
    with pytest.raises(TemplateError, match="refuses the messages: roles must alternate"):
        template.render(TALK[1:])


def test_blocks_take_their_own_line_away() -> None:
    source = "{% for m in messages %}\n    {% if m.content %}\n{{ m.content }}|\n    {% endif %}\n{% endfor %}\nend\n"
    assert ChatTemplate(source).render(TALK) == "Hi|\nYes?|\nWhy?|\nend"


def test_generation_blocks_loop_controls_and_python_methods() -> None:
    source = (
        "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{%- generation -%} "
        "{{ m.content.split('?')[0].upper() }}"
        "{% endgeneration %}{% if m.get('name', '').startswith('x') %}x{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source).render(TALK) == "HIYES"


def test_tojson_writes_json_and_not_html() -> None:
    message = {"role": "user", "content": "<é & 'q'>\n"}
    assert ChatTemplate("{{ messages[0].content | tojson }}").render([message]) == "\"<é & 'q'>\\n\""
    assert ChatTemplate("{{ {'a': [1]} | tojson(indent=1) }}").render([message]) == '{\n "a": [\n  1\n ]\n}'


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% set x = 'a' * 90000 %}{% for a in range(100000) %}{{ x }}{% endfor %}",
        "{% set x = 'a' * 90000 %}{% for a in range(100000) %}{{ x.title() | length }}{% endfor %}",
        "{% for a in range(100000) %}{{ 'a'.ljust(9999) | length }}{% endfor %}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
        "{% set x = ['a' * 900] * 9000 %}{% for a in range(100000) %}{{ x | sort | length }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source)
    started = time.process_time()
    with pytest.raises(TemplateError):
        template.render(HELLO)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 2 * 3 }} {{ 4 / 2 * 3 }} {{ (4 / 2) * 3 }} {{ 10 - 2 * -3 }}", "6 6.0 6.0 16"),
        ("{{ 2 ** 3 * 2 ** 2 }} {{ 7 // 2 * 2 % 4 }} {{ 1.5 * 2 * 3 }} {{ -1 % 3 * 2 }}|{{ -2 * 'a' }}|", "32 2 9.0 4||"),
        ("{{ '-' * 3 }} {{ ['a'] * 2 }} {{ (2 * [1, 2])|join }} {{ 'a' ~ 'b' * 2 }}", "--- ['a', 'a'] 1212 abb"),
        ("{% for m in messages %}{{ '=' * loop.index }}{{ loop.index * 2 * messages|length }}{% endfor %}", "=2"),
        ("{% if 0 %}{% elif 2 * messages|length == 2 %}{{ messages[0 * 1].content * 2 }}{% endif %}", "hihi"),
    ],
)
def test_products_are_those_of_python(source: str, expected: str) -> None:
    assert ChatTemplate(source).render([{"role": "user", "content": "hi"}]) == expected


@pytest.mark.parametrize("source", ["{{ ['a' * 9999] * 9999 }}", "{{ (9999 * messages)[0] * 9999 }}", "{{ 'ab' * 10 ** 9 }}"])
def test_repetition_without_measure_is_refused_by_name(source: str) -> None:
    with pytest.raises(TemplateError, match="repeats or reads too much") as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi" * 999}])
    assert "correct the template" in caught.value.hint


def test_more_output_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_deploy.runtime.text.template.MAX_OUTPUT_CHARS", 20)
    with pytest.raises(TemplateError, match="over the limit of 20"):
        ChatTemplate("{{ messages[0].content * 3 }}").render(HELLO)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a", "{% for m in messages %}", "{% nothing %}"])
def test_a_template_that_does_not_parse_is_named_with_its_line(source: str) -> None:
    with pytest.raises(TemplateError, match="line 2 of the chat template") as caught:
        ChatTemplate("\n" + source)
    assert caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{{ nobody.knows }}",
        "{{ 1 + none }}",
        "{{ nothing() }}",
        "{{ messages | tojson(depth=1) }}",
        "{{ strftime_now(1) }}",
        "{% include 'etc' %}",
    ],
)
def test_a_template_that_fails_is_named_without_the_messages(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "a secret"}])
    assert "chat template" in caught.value.message and caught.value.hint
    assert "secret" not in caught.value.message


def test_a_template_sees_no_python() -> None:
    source = "{{ messages.__class__ }}{{ messages[0].__init__ }}{{ raise_exception.__globals__ }}{{ ''.__class__ }}"
    assert ChatTemplate(source).render(HELLO) == ""


def test_a_template_over_the_size_limit_is_refused() -> None:
    with pytest.raises(TemplateError, match="over the limit"):
        ChatTemplate("a" * (MAX_TEMPLATE_CHARS + 1))


@pytest.mark.parametrize(
    "messages",
    ["Hello", {"role": "user"}, [], ["Hello"], [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": None}],
     [{"role": "", "content": "a"}], [{"role": 1, "content": "a"}], [{"role": "user", "content": "a", "name": ["b"]}], None,
     [{"role": "user", "content": b"a"}], [{"role": "user", "content": "half a pair \ud83d"}],
     [{"role": "\ud83d", "content": "a"}]],
    ids=ascii,
)  # fmt: skip
def test_messages_of_a_wrong_form_are_refused(messages: object) -> None:
    with pytest.raises(PromptError):
        check_messages(messages)
    with pytest.raises(PromptError):
        ChatTemplate(CHATML).render(messages)  # type: ignore[arg-type]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minijinja", None)
    with pytest.raises(MissingDependencyError) as caught:
        ChatTemplate(CHATML)
    assert "medusa-deploy[cpu]" in caught.value.hint
