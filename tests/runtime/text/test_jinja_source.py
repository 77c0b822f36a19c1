"""A template's source is rewritten where minijinja reads it otherwise than jinja2, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.text.jinja_source import rewrite
from medusa_deploy.runtime.text.jinja_writer import UnsupportedError


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ a.b.title() }}", '{{ (a.b|_method("title")) }}'),
        ("{{ 'a b'.split(sep=' ')[0].zfill(3) }}", """{{ (('a b'|_method("split", sep=' '))[0]|_method("zfill", 3)) }}"""),
        ("{{ f(x.title(), y.z['k'].split()) }}", '{{ f((x|_method("title")), (y.z[\'k\']|_method("split"))) }}'),
        ("{{ '%s, %s' % (a, b.c) ~ d }}", "{{ ('%s, %s' |_percent( (a, b.c) |default(_undefined)))~ d }}"),
        ("{% if x % 2 and 'a' %}", "{% if x % 2 and 'a' %}"),
        ("{{ x | default('a', boolean=true) }}", "{{ x | default('a', true) }}"),
        ("{{ f(boolean=true) }}", "{{ f(boolean=true) }}"),
        ("{{ x | sort | first }}", "{{ x |default(_undefined)| sort | first }}"),
        ("{% if a.b is not iterable and c is sequence %}",
         "{% if a.b |default(_undefined) is not iterable and c |default(_undefined) is sequence %}"),
        ("{{ x | tojson(indent=2) }}", "{{ x |default(_no_json)| tojson|_json(indent=2) }}"),
        ("{{ x | map('tojson', indent=2) }}", '{{ x | map("tojson")|map("_json", indent=2) }}'),
        ("{% filter tojson %}a{% endfilter %}", "{% filter tojson|_json %}a{% endfilter %}"),
        ("{{ range is callable }}", "{{ range is defined }}"),
        ("{% set kwargs = 1 %}{% macro m(varargs) %}{{ varargs ~ kwargs }}{% endmacro %}{{ kwargs }}",
         "{% set kwargs = 1 %}{% macro m(varargs) %}{{ varargs ~ kwargs }}{% endmacro %}{{ kwargs }}"),
        ("{{ +1 - +2 }}", "{{ 1 - 2 }}"),
        ("{{ a / b * c + 1 }}", "{{ (a / b * c if (a / b) is number and (c) is number else (a / b)|_times(c)) + 1 }}"),
        ("{{ f(x) * n }}", "{{ ((f(x))|_times(n)) }}"),
        ("{{ a * b * c }}",
         "{{ (a * b * c if (a) is number and (b) is number and (c) is number else (a)|_times(b)|_times(c)) }}"),
        ("{% if 0 %}{% elif a * 2.0 and b %}", "{% if 0 %}{% elif a * 2.0 and b %}"),
        ("{%- generation -%}a{% endgeneration %}", "{%- with -%}a{% endwith %}"),
        ("{{ '{% generation %}' }}{# {% generation %} #}", "{{ '{% generation %}' }}{# {% generation %} #}"),
        ("{% raw %}\n{{ a.title() }}{% endraw %}", "{% raw +%}\n{{ a.title() }}{% endraw %}"),
        ("a\r\nb\rc", "a\nb\nc"),
        (r"{{ '\/' }}{{ '\U0001F600\n' }}", r'{{ "\\/" }}{{ "😀\n" }}'),
        ("{{ {'a': {'b': 1}} }}x{{ y }}", "{{ {'a': {'b': 1}} }}x{{ y }}"),
        ("{{ 'a", "{{ 'a"),
        ("{# a", "{# a"),
        ("{% if a is not none and b is defined %}", "{% if a is not none and b is defined %}"),
    ],
)  # fmt: skip
def test_what_is_rewritten(source: str, written: str) -> None:
    assert rewrite(source) == written


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("{{ 1e20 }}", "has the number 1e20"),
        ("{{ x * 0.00001 }}", "has the number 0.00001"),
        ("{{ 1e999 }}", "has the number 1e999"),
        ("{% macro m(a) %}\n{{ varargs }}{% endmacro %}", "reads varargs in a macro"),
        ("{% macro m() %}{% for k in kwargs %}{% endfor %}{% endmacro %}", "reads kwargs in a macro"),
    ],
)
def test_what_no_rewriting_helps_is_named_with_its_line(tag: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        rewrite("a\n" + tag)
    assert str(caught.value).startswith(f"line {3 if 'a) %}' in tag else 2} of the chat template")


PARTS = st.sampled_from(
    ["{{", "}}", "{%", "%}", "{#", "#}", "-", "+", " ", "\n", "'", '"', "\\", "(", ")", "[", "]", ".", "a", ".title(",
     "%", "|", "is", "raw", "endraw", "1"]
)  # fmt: skip


@given(st.lists(PARTS, max_size=24))
def test_any_source_is_rewritten_line_by_line(parts: list[str]) -> None:
    source = "".join(parts)
    assert rewrite(source).count("\n") == source.count("\n") or "\\\n" in source
