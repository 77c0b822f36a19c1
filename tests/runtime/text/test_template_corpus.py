"""Constructs that published chat templates use render as jinja2 with transformers' settings renders them.

The templates are the project's own. Each is rendered over several shapes of chats. Where jinja2 fails, so must the runtime.
"""

from __future__ import annotations

from typing import Any

import pytest

from medusa_deploy.runtime.text.template import ChatTemplate

pytest.importorskip("minijinja")
utils = pytest.importorskip("transformers.utils.chat_template_utils")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
SYSTEM = {"role": "system", "content": " You are brief. "}
USER = {"role": "user", "content": "Hello <b> & 'you'\n"}
ANSWER = {"role": "assistant", "content": "<think>\nHm. 日本\n</think>\n\nYes?"}
LAST = {"role": "user", "content": 'Why "so" 👋?'}
SHAPES: tuple[list[dict[str, str]], ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, LAST],
    [SYSTEM, USER, ANSWER, LAST],
    [SYSTEM],
    [USER, LAST],
    [USER, ANSWER],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, LAST],
    [USER, {"role": "assistant", "content": "x", "reasoning": "two"}, {"role": "tool", "content": "4", "name": "sum"}],
)
LOOP = "{% for message in messages %}", "{% endfor %}"


def each(body: str) -> str:
    """Return a template that repeats ``body`` for every message."""
    return body.join(LOOP)


WHOLE = [
    # the usual families: marks around each turn, a header, alternating roles, a default system message
    each("{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    each(
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help<|im_end|>\n' }}{% endif %}"
        "{{ '<|' ~ message.role ~ '|>' ~ message.content }}"
    ),
    "{{ bos_token }}"
    + each(
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    ),
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}{{ bos_token + system_message }}"
    + each(
        "{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{{ message.role }}: {{ content.strip() }}\n"
    ),
    (
        "{%- set ns = namespace(found=false, last=-1, text='') %}\n{%- for message in messages %}\n"
        "    {%- if message.role == 'user' and not ns.found %}\n        {%- set ns.found = true %}\n    {%- endif %}\n"
        "    {%- set ns.last = loop.index0 %}\n    {%- set ns.text = ns.text + message.role[0] %}\n{%- endfor %}\n"
        "{{- ns.found }} {{ ns.last }} {{ ns.text }}"
    ),
    (
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}"
        '{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == "user" and '
        "message.content is string and not(message.content.startswith('<tool_response>') and "
        "message.content.endswith('</tool_response>')) %}{%- set ns.multi_step_tool = false %}"
        "{%- set ns.last_query_index = index %}"
        "{%- endif %}{%- endfor %}{{ ns.last_query_index }}"
    ),
    each(
        "{% if message.role == 'assistant' and '</think>' in message.content %}"
        "{% set reasoning = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = message.content.split('</think>')[-1].lstrip('\\n') %}[{{ reasoning }}]{{ content }}"
        "{% else %}{{ message.content }}{% endif %}"
    ),
    each(
        "{% if message.reasoning_content is defined and message.reasoning_content is not none %}"
        "<think>{{ message.reasoning_content }}</think>{% endif %}"
        "{% if message.thinking is defined %}[{{ message.thinking }}]{% endif %}{{ message.content }}"
    ),
    (
        "{%- if tools is not none %}tools{% endif %}"
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{{ date_string }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}{{ tools }}"
    ),
    (
        "{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}"
        "{%- if tools is iterable and tools | length > 0 %}T{%- endif %}-"
    ),
    "{%- if tools %}T{% else %}none{% endif %}{% if documents %}D{% endif %}{{ documents is none }}",
    "{%- macro render(message, prefix='') %}{{ prefix }}{{ message.role | upper }}{% if message.content is string %}="
    "{{ message.content | trim }}{% endif %}{%- endmacro -%}" + each("{{ render(message) }}{{ render(message, prefix='+') }}"),
    "{% macro outer(x) %}<{{ caller() }}{{ x }}>{% endmacro %}{% call outer(1) %}in{% endcall %}",
    each(
        "{%- if loop.last and add_generation_prompt is defined and add_generation_prompt %}last{% endif %}{{ loop.index }}/"
        "{{ loop.length }}/{{ loop.revindex }}/{{ loop.revindex0 }}"
    ),
    each(
        "{% if loop.previtem is defined %}{{ loop.previtem.role }}{% endif %}>{% if loop.nextitem is defined %}"
        "{{ loop.nextitem.role }}{% endif %};"
    ),
    each("{% if loop.changed(message.role) %}{{ message.role }}{% endif %}{{ loop.cycle('a', 'b') }}"),
    "{% for message in messages if message.role != 'system' %}{{ loop.index }}{{ message.role }}{% else %}nobody{% endfor %}",
    "{% for message in messages %}{% if message.role == 'assistant' %}{% break %}{% endif %}{{ message.role }}{% endfor %}",
    "{% for message in messages %}{% if message.role == 'user' %}{% continue %}{% endif %}{{ message.role }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for key, value in messages[0] | dictsort %}{{ key }}={{ value }};{% endfor %}",
    "{% for key in messages[-1] %}{{ key }}{% endfor %}{{ 'name' in messages[-1] }}{{ messages[-1].keys() | list }}",
    "{% set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}{{ loop_messages | length }}",
    "{% set roles = messages | map(attribute='role') | list %}{{ roles | join(',') }}{{ roles | unique | list | length }}",
    (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ messages | rejectattr('role', 'eq', 'user') | list | length }}"
    ),
    "{{ (messages | selectattr('role', '==', 'user') | map(attribute='content') | list)[-1] }}{{ (messages | last).role }}",
    "{{ messages | groupby('role') | map('first') | join('/') }}",
    "{% set q %}a{{ messages | length }}\n{% endset %}[{{ q }}]",
    "{% filter upper %}a{{ messages[0].role }}{% endfilter %}",
    "{% with a = 1, b = 'x' %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}",
    each("{% generation %}{{ message.content }}{% set q = 1 %}{% endgeneration %}{{ q }}"),
    each("{%- generation -%} a {%- endgeneration %}\n b"),
    "{{ '{% generation %}' }}{% raw %}\n{{ x }}{% generation %}{% endraw %}|",
    "  {%- raw -%}  a  {%- endraw -%}  b",
    "a\r\nb\r{{ 'c\r\nd' }}\n",
    "{# a comment {{ x }} #}\n  {#- another -#}  x {# end #}",
    "{% filter tojson %}<{{ messages[0].content }}{% endfilter %}",
    "    {% if true %}\n  a\n    {% endif %}\n  b\n{%+ if true %}c{%+ endif %}\n",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = [1, 2] + [3] %}{{ c }}",
    "{% set d = {'x': {'y': 1}} %}{{ d.x.y }}{{ d['x']['y'] }}",
    "{{ messages[0]['content'][:5] }}|{{ messages[0]['content'][-3:] }}",
    "{{ messages[0].content[::-1] }}|{{ messages[-1].content[0] }}",
    "{{ strftime_now('%Y')[:2] }}{{ strftime_now is defined }}{{ raise_exception is defined }}{{ namespace is defined }}",
    "{{ bos_token }}{{ pad_token }}{{ image_token }}{{ sep_token }}{{ sep_token is defined }}{{ bos_token is defined }}",
    "{% if messages[0].role not in ['user', 'system'] %}{{ raise_exception('first ' ~ messages[0].role) }}{% endif %}ok",
    "{% set sep = joiner('; ') %}" + each("{{ sep() }}{{ message.role }}"),
    "{% set turns = cycler('u', 'a') %}" + each("{{ turns.next() }}{{ turns.current }}"),
]
"""Templates as models publish them, by their parts."""

EXPRESSIONS = r"""
none is iterable ¦ 'ab' is iterable ¦ messages is iterable ¦ 3 is iterable ¦ messages is sequence ¦ 'ab' is sequence
{} is sequence ¦ messages is mapping ¦ messages[0] is mapping ¦ messages[0].content is string ¦ messages[0].nothing is defined
true is boolean ¦ messages[0].nothing is none ¦ none is none ¦ 1 is number and 1.5 is float ¦ 2 is even and 3 is odd
4 is divisibleby 2 ¦ 'a' is in 'abc' ¦ true is true and false is false ¦ 1 is sameas 1 ¦ 'a' is eq 'a'
'A' is upper and 'a' is lower ¦ nothing is undefined ¦ not nothing ¦ messages[0].content is not string ¦ nothing or 'other'
nothing is iterable ¦ nothing is sequence ¦ nothing | sort ¦ nothing | int ¦ nothing | wordcount
'%s' % nothing ¦ raise_exception is callable
1.0 | tojson ¦ [1.0, {'a': 2.0}] | tojson(indent=1) ¦ [1.0, 2] | map('tojson') | join(',') ¦ 'x' | float ¦ 'a\tb'.expandtabs(4)
messages | wordwrap ¦ messages.title() ¦ messages[0].capitalize() ¦ nothing | tojson ¦ range is callable ¦ 0.001 ¦ 1e15
'' or none or 0 or 'x' ¦ 1 if false ¦ 'a' if messages else 'b' ¦ nothing ¦ nothing | default('d') ¦ none | default('d')
'' | default('d', true) ¦ none | default('d', boolean=true) ¦ nothing | d(default_value='e') ¦ 'a' ~ 1 ~ none ~ true ~ 1.5
[1, 'a', none, true, 1.5, {'b': []}] ¦ {'a': 1, 'b': [none]} ¦ (1, 'x') ¦ (1,) ¦ () ¦ 'it\'s' ¦ ["it's"] ¦ 1 + 2 * 3 ¦ 7 // 2
7 / 2 ¦ 4 / 2 ¦ -7 // 2 ¦ -7 % 3 ¦ 2 ** 8 ¦ +1 ¦ 3 - +1 ¦ (1 + 2) * 3 ¦ 1 == 1.0 ¦ 1 < 2 < 3 ¦ 'a' < 'b' ¦ not 1 == 2
'a' * 3 ¦ 'a' + 'b' ¦ [1] + [2] ¦ 'b' in 'abc' ¦ 'x' not in ['y'] ¦ 1 in [1, 2] ¦ 'role' in messages[0] ¦ 5 % 3
'%s-%s' % ('a', 'b') ¦ '%05.1f|%d' % (2.5, 3) ¦ 'n: %s' % messages[0].role ¦ 'a%' ~ '%s' % 'b' ~ 'c' ¦ '100%'
('%s' % 1) + 'x' ¦ '%s' % messages[0].role | upper ¦ 'a b c'.split() ¦ 'a b c'.split(' ') ¦ 'a b c'.split(' ', 1)
'a b c'.split(' ', maxsplit=1) ¦ 'a  b'.split(' ')[1] ¦ 'abc'.split('b')[-1] ¦ 'a b c'.rsplit(' ', 1)[0]
'a=b'.partition('=') ¦ 'a=b=c'.rpartition('=')[2] ¦ 'ab'.index('b') ¦ 'ab'.find('x') ¦ 'ab'.removeprefix('a')
'ab'.removesuffix('b').upper() ¦ '7'.zfill(3) ¦ 'a'.ljust(3) ~ '|' ¦ 'a'.rjust(3, '.') ¦ 'a'.center(3) ¦ 'a b,c'.title()
'aB'.swapcase() ¦ 'ABC'.lower() ¦ 'abc'.capitalize() ¦ ' a '.strip() ~ '|' ¦ 'xxa'.lstrip('x') ¦ 'a\n'.rstrip()
'aXbX'.replace('X', '-') ¦ 'a,b'.count(',') ¦ 'a\nb'.splitlines() ¦ 'abc'.startswith('a') ¦ 'abc'.endswith(('c', 'd'))
'abc'.startswith(('b', 'c')) ¦ ','.join(['a', 'b']) ¦ '12'.isdigit() ¦ messages.index(messages[0]) ¦ [1, 2, 1].count(1)
{'a': 1}.get('a') ¦ {'a': 1}.get('b', 'c') ¦ {'a': 1}.get('b') ¦ {'a': 1}.items() | list ¦ {'a': 1}.values() | list
dict(a=1, b='x') ¦ dict([('a', 1)]) ¦ dict(a=1).a ¦ range(3) | list ¦ range(1, 6, 2) | list ¦ 'a-b'.split('-') | last
messages[0].role.title().lower().split('s')[0] ¦ messages[0]['role'].upper()[0] ¦ (messages[0].role ~ 'x').title()
['a b'][0].split()[1] ¦ messages[0].content.title() ¦ messages[0].content | title ¦ messages[0].content | capitalize
'a' | upper ¦ 'A' | lower ¦ ' a ' | trim ¦ 'xax' | trim('x') ¦ 'abc' | length ¦ [1, 2] | count ¦ 'abc' | first ¦ [] | first
[1, 2] | last ¦ 'abc' | reverse ¦ [1, 2] | reverse | list ¦ [3, 1, 2] | sort ¦ [1, 3, 2] | sort(true)
[1, 3, 2] | sort(reverse=true) ¦ ['b', 'A', 'c'] | sort ¦ messages | sort(attribute='role') | first ¦ [1, 2, 3] | sum
[1, 3] | max ¦ [1, 3] | min ¦ ['a', 'b'] | join ¦ [1, 2] | join(', ') ¦ 'a,b' | replace(',', ';') ¦ '<&>' | e ¦ '<&>' | safe
'3' | int ¦ 'a' | int ¦ 'a' | int(3) ¦ '3.7' | int ¦ 3.7 | int ¦ '0x1A' | int(0, 16) ¦ '1.5' | float ¦ 2.567 | round(1)
2.5 | round ¦ -3 | abs ¦ 5 | string ~ 'a' ¦ 'ab' | list ¦ 'a b c' | wordcount ¦ 'a' | center(3) ~ '|'
'a b c d' | wordwrap(3) ¦ 'a\nb' | indent(2) ¦ 'a\nb' | indent(2, true) ¦ [1, 2, 3, 4] | batch(2) | list
[1, 2, 3] | slice(2) | list ¦ [1, 1, 2] | unique | list ¦ ['a', ''] | select | list ¦ [1, 2] | reject('odd') | list
['a', 'b'] | map('upper') | list ¦ messages | map(attribute='role') | join('-')
[{'a': 1}, {}] | map(attribute='a', default=0) | list ¦ {'a': 1} | tojson ¦ {'a': 'é<'} | tojson
{'b': 1, 'a': [true, none]} | tojson(indent=2) ¦ {'a': 1} | tojson(false) ¦ messages[0] | tojson
{'b': 1, 'a': 2} | tojson(sort_keys=true) ¦ [1, 2] | tojson(separators=(',', ':')) ¦ 'a"b\n' | tojson ¦ 1.5 | tojson
{} | tojson(indent=4) ¦ '\x41\u0041\n\t\\' ¦ '\/' ¦ '\U0001F600' ¦ '\101' ¦ '\'' ¦ "a\"b" ¦ 'a' 'b' ¦ "日本" ¦ '👋'
'a\b' ¦ 1_000 ¦ 1.5e3 ¦ 0.1 + 0.2 ¦ 100000000000000000000 ¦ 1e3 ¦ 3.0 ¦ true and 1 ¦ none ¦ true ¦ false ¦ True ¦ False
None ¦ loop is defined ¦ messages[10] ¦ messages[10].role ¦ messages[0].nothing ¦ messages[0].nothing.more ¦ messages.nothing
'a'.nothing ¦ none.x ¦ [1][5] is defined ¦ messages[0].__class__ ¦ ''.__class__.__mro__ ¦ messages.__len__() ¦ 'a' + 1
none + 'a' ¦ 'x' in none ¦ nothing + 'a' ¦ nothing() ¦ 1 // 0 ¦ messages[0].content ¦ nothing2 ¦ 'a' is nothing3 ¦ []
max is defined ¦ {'a': {'b': 2}}['a']['b'] ¦ messages[0].get('role', '') ¦ messages[0]['role'][0] ¦ namespace(a=1).a
namespace(a=[1]).a[0] ¦ [[1, 2], [3]][0][1] ¦ {'x': [1]}.x[0] ¦ [x for x in 'a'] ¦ messages[0].content | length > 3
'a' if nothing is defined and nothing else 'b' ¦ (messages | length) % 2 ¦ 'abc'[1:] ~ 'abc'[:-1] ¦ 'abcdef'[::2]
messages[-1].content | string  ¦ 'a' | format ¦ '%s' | format('x')
'{} {}'.format('a', 1) ¦ 'a' | attr('x') is defined ¦ [1, [2]] | string
"""
"""Expressions, parted by bars and lines."""
KINDS = (
    "nothing", "messages[0].nothing", "none", "''", "'a b'", "'12'", "3", "2.0", "true", "[]", "['b', 'a']", "{'b': 1.0}",
    "(1, 2)", "messages",
)  # fmt: skip
FORMS = (
    "{} is iterable", "{} is sequence", "{} is mapping", "{} is not iterable", "{} is string", "{} is number", "{} is defined",
    "{} | int", "{} | float", "{} | tojson", "{} | tojson(indent=1)", "{} | wordcount", "{} | center(9)", "{} | string",
    "{} | default('d')", "{} | default('d', true)", "{} | length", "{} | first", "{} | trim", "{} ~ 'x'", "{} or 'x'", "not {}",
)  # fmt: skip
"""Values of every kind in the forms in which minijinja hands them to Python, and some that it keeps."""


SOURCES = [*WHOLE, *(f"{{{{ {cell} }}}}" for line in EXPRESSIONS.strip().splitlines() for cell in line.split(" ¦ "))]
CROSSED = [f"{{{{ {form.replace('{}', kind)} }}}}" for kind in KINDS for form in FORMS]


def result(make: Any) -> Any:
    """Return the text that ``make`` renders, or the word error."""
    try:
        return make()
    except Exception:  # noqa: BLE001 jinja2 raises anything
        return Exception


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_a_construct_renders_as_jinja2_renders_it(source: str) -> None:
    for shape in SHAPES:
        theirs = result(
            lambda shape=shape: utils.render_jinja_template([shape], chat_template=source, add_generation_prompt=True, **SPECIAL)[
                0
            ][0]
        )
        ours = result(lambda shape=shape: ChatTemplate(source, SPECIAL).render(shape))
        assert ours == theirs, [message["role"] for message in shape]


@pytest.mark.parametrize("source", CROSSED)
def test_a_value_of_any_kind_is_treated_as_by_jinja2(source: str) -> None:
    chat = SHAPES[3]
    theirs = result(lambda: utils.render_jinja_template([chat], chat_template=source, **SPECIAL)[0][0])
    assert result(lambda: ChatTemplate(source, SPECIAL).render(chat)) == theirs


def test_most_of_the_corpus_renders() -> None:
    rendered = 0
    for source in SOURCES:
        rendered += result(lambda source=source: utils.render_jinja_template([SHAPES[3]], chat_template=source)) is not Exception
    assert len(WHOLE) >= 40 and rendered > 260
