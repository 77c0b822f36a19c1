"""Grammars of every kind through llguidance: places, ends, limits, and errors by name."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Grammar, Request, Rows
from medusa_deploy.runtime.errors import DeployError, GrammarError, MissingDependencyError, UsageError
from medusa_deploy.runtime.grammar import MAX_CHARS
from medusa_deploy.runtime.text.guidance import GuidanceMatcher
from support.fake_executor import FakeSession, fake_session
from support.schemas import schemas
from support.text import encode

pytest.importorskip("llguidance", reason="grammars need llguidance")

EOS = frozenset({2})
_GRAMMARS = [*map(Grammar.json, schemas()[:40:4]), Grammar("regex", "[ab]{2,4}c|d+"), Grammar.choice(["yes", "no", "yellow"])]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> FakeSession:
    return fake_session(capacity=1000, text_folder=tmp_path_factory.mktemp("text"), eos_token_ids=(2,))


def _matcher(session: FakeSession, grammar: Grammar) -> GuidanceMatcher:
    return session.grammars.matcher(grammar, EOS)


@settings(max_examples=60, deadline=None)
@given(grammar=st.sampled_from(_GRAMMARS), data=st.data())
def test_a_place_depends_on_the_tokens_before_it_alone(session: FakeSession, grammar: Grammar, data: st.DataObject) -> None:
    """Looking ahead anywhere, also where the grammar refuses it, leaves no trace."""
    matcher, emitted = _matcher(session, grammar), list[int]()
    for _ in range(data.draw(st.integers(1, 12))):
        paths: list[list[int]] = [[]]
        for _ in range(data.draw(st.integers(0, 6))):
            start = data.draw(st.sampled_from(paths))
            if matcher.finished(start):
                continue
            allowed = np.flatnonzero(matcher.allowed(start))
            token = int(data.draw(st.sampled_from(list(allowed))) if data.draw(st.booleans()) else data.draw(st.integers(3, 127)))
            if matcher.admits(start, token):
                paths.append([*start, token])
        fresh = _matcher(session, grammar)
        fresh.advance(emitted)
        for path in paths:
            assert fresh.finished(path) == matcher.finished(path)
            if not matcher.finished(path):
                assert np.array_equal(fresh.allowed(path), matcher.allowed(path))
                assert fresh.only(path) == matcher.only(path)
        if matcher.finished():
            return
        token = int(data.draw(st.sampled_from(list(np.flatnonzero(matcher.allowed())))))
        if token in EOS:
            return
        matcher.advance([token])
        emitted.append(token)


def test_the_end_is_allowed_where_the_text_may_end(session: FakeSession) -> None:
    matcher = _matcher(session, Grammar("regex", "a{2,4}"))
    ends = []
    for _ in range(4):
        ends.append(bool(matcher.allowed()[2]))
        matcher.advance(encode("a"))
    assert ends == [False, False, True, True] and matcher.finished()
    unending = session.grammars.matcher(Grammar("regex", "a{2,4}"), frozenset())
    assert not unending.allowed(encode("aaa"))[2]


def test_what_the_vocabulary_cannot_spell_ends_by_name(session: FakeSession) -> None:
    grammar = Grammar.json({"type": "object", "properties": {"a": {"const": "日本"}}, "required": ["a"]})
    for way in (ROOT_ONLY, Rows(8)):
        got = dict(session.generate_many([Request("?", max_new_tokens=60, grammar=grammar, drafting=way)]))[0]
        assert isinstance(got.error, GrammarError) and got.text == '{"a": "'


@pytest.mark.parametrize("source", ["日(ab|c)x", "\ud7ff[a-f]+", "a日(b|c)"])
def test_nothing_behind_a_character_that_cannot_be_spelt_is_allowed(session: FakeSession, source: str) -> None:
    got = dict(session.generate_many([Request("?", max_new_tokens=9, grammar=Grammar("regex", source))]))[0]
    assert isinstance(got.error, GrammarError) and got.text == ("a" if source.startswith("a") else "")


def test_forced_tokens(session: FakeSession) -> None:
    schema = {"type": "object", "properties": {"ab": {"const": 1}}, "required": ["ab"], "additionalProperties": False}
    matcher, path = _matcher(session, Grammar.json(schema)), list[int]()
    while (token := matcher.only(path)) is not None:
        path.append(token)
    assert path == encode('{"ab": 1}') and matcher.finished(path)


@pytest.mark.parametrize("grammar", [
    Grammar("regex", "(red|green) [0-9]{2}"), Grammar("lark", 'start: "x" NUM "y"\nNUM: /[0-9]{3}/'),
    Grammar.choice(["one", "two"]), Grammar.json(), Grammar.json(True), Grammar("json_schema", "true"),
    Grammar.json('{"type": "boolean"}'),
], ids=["regex", "lark", "choice", "object", "any", "true", "text"])  # fmt: skip
def test_every_kind(session: FakeSession, grammar: Grammar) -> None:
    got = session.generate("?", max_new_tokens=400, grammar=grammar)
    if grammar.kind == "json_schema" and got.finish_reason == "stop":
        json.loads(got.text)
    assert got.token_ids


_SELF = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
_DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(400):
    _DEEP = {"type": "array", "items": _DEEP}
HOSTILE = {
    "not JSON": Grammar("json_schema", '{"type": '),
    "no schema": Grammar("json_schema", "[1]"),
    "unknown type": Grammar.json({"type": "text"}),
    "unsupported keyword": Grammar.json({"not": {"type": "string"}}),
    "no answer": Grammar.json(False),
    "empty enum": Grammar.json({"enum": []}),
    "foreign reference": Grammar.json({"$ref": "http://example.com/schema"}),
    "file reference": Grammar.json({"$ref": "file:///etc/passwd"}),
    "missing reference": Grammar.json({"$ref": "#/$defs/none"}),
    "reference to itself": Grammar.json(_SELF),
    "contradiction": Grammar.json({"type": "string", "minLength": 5, "maxLength": 2}),
    "look-ahead": Grammar.json({"type": "string", "pattern": "(?=a)b"}),
    "bad pattern": Grammar("regex", "(a"),
    "deep": Grammar.json(_DEEP),
    "deep regex": Grammar("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "deep lark": Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "unknown rule": Grammar("lark", "start: foo"),
    "no start": Grammar("lark", 'foo: "a"'),
    "big repetition": Grammar("regex", "((a|b|[c-x]){1,3000}y){1,3000}z" * 20),
    "wide": Grammar.json({"anyOf": [{"type": "string", "pattern": f"^.*{n}.{{1,500}}$"} for n in range(400)]}),
    "many": Grammar.json({"properties": {f"p{n}": {"type": "string", "pattern": f".*a{n}.*b"} for n in range(3000)}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_by_name_and_in_time(session: FakeSession, name: str) -> None:
    """A grammar is refused, or answers under it go on within the limits; nothing hangs."""
    began = time.monotonic()
    try:
        got = dict(session.generate_many([Request("?", max_new_tokens=40, grammar=HOSTILE[name])]))[0]
        error = got.error
    except DeployError as refused:
        error = refused
    assert error is None or isinstance(error, GrammarError)
    if name not in ("big repetition", "wide", "many"):
        assert error is not None and error.message
        assert len(error.message) < 600
    assert time.monotonic() - began < 60
    assert session.generate("?", max_new_tokens=5).token_ids and session.slots.free == 1


def test_what_is_no_grammar() -> None:
    for kind, source in (("gbnf", "x"), ("regex", ""), ("regex", "a" * (MAX_CHARS + 1)), ("lark", "\ud800"), ("lark", 3)):
        with pytest.raises(GrammarError):
            Grammar(kind, source)  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="isn't JSON"):
        Grammar.json({"a": object()})
    for texts in ([], ["a", ""], [3]):
        with pytest.raises(GrammarError, match="choices"):
            Grammar.choice(texts)  # type: ignore[arg-type]


def test_a_request_takes_a_grammar_alone() -> None:
    with pytest.raises(UsageError, match="grammar is"):
        Request("x", grammar={"type": "object"})  # type: ignore[arg-type]


def test_without_the_package_or_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="needs a tokenizer"):
        fake_session().generate(token_ids=[3], grammar=Grammar.json())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match="llguidance") as raised:
        fake_session(text_folder=tmp_path).generate("x", grammar=Grammar.json())
    assert "medusa-deploy[guided]" in raised.value.hint


def test_compiled_grammars_are_kept(session: FakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar("regex", "kept{3}")
    first = _matcher(session, grammar)
    monkeypatch.setitem(sys.modules, "llguidance", None)  # compiling again would need it
    second = _matcher(session, grammar)
    first.advance(encode("kep"))
    assert second.only() == encode("k")[0] and first.only() == encode("t")[0]
