"""``manifest.json`` is read back as written; whatever is wrong with it, one error refuses it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from medusa_deploy.runtime.errors import BundleSchemaError
from medusa_deploy.runtime.files.manifest import SCHEMA_VERSION, Manifest, parse_manifest
from medusa_deploy.runtime.tree import chain
from support.records import manifest

GOOD: dict[str, Any] = json.loads(manifest().to_json())


def _changed(path: tuple[str, ...], value: object) -> str:
    """Returns the good manifest's text with one value replaced, or dropped if the value is ``...``."""
    raw = copy.deepcopy(GOOD)
    parent = raw
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return json.dumps(raw)


def test_a_manifest_reads_back_as_written() -> None:
    written = manifest()
    read = parse_manifest(written.to_json())
    assert read == written
    assert parse_manifest(written.to_json().encode()) == written
    assert read.tree() == chain(3)


def test_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(BundleSchemaError, match=f"schema version {SCHEMA_VERSION + 1}; this program reads up to") as caught:
        parse_manifest(_changed(("schema_version",), SCHEMA_VERSION + 1))
    assert "upgrade" in caught.value.hint


def test_the_first_schema_is_read_as_heads_that_nobody_measured() -> None:
    raw = copy.deepcopy(GOOD)
    del raw["heads"]["platt_scaling"], raw["engines"], raw["text"]["special_tokens"]
    raw["schema_version"] = 1
    raw["text"] |= {"bos_token": None, "eos_token": None}
    read = parse_manifest(json.dumps(raw))
    assert read.heads.platt_scaling == ()
    assert read.schema_version == SCHEMA_VERSION
    with pytest.raises(BundleSchemaError):
        parse_manifest(json.dumps({**raw, "schema_version": 2}))


@pytest.mark.parametrize("version", [1, 2])
def test_older_schemas_know_two_special_tokens(version: int) -> None:
    raw = copy.deepcopy(GOOD)
    del raw["text"]["special_tokens"]
    raw |= {"schema_version": version, "text": raw["text"] | {"bos_token": "<s>", "eos_token": None}}
    read = parse_manifest(json.dumps(raw))
    assert read.text.special_tokens == {"bos_token": "<s>"} and read.schema_version == SCHEMA_VERSION
    for wrong in ({"bos_token": 1}, {"surprise": 1}):
        with pytest.raises(BundleSchemaError):
            parse_manifest(json.dumps(raw | {"text": raw["text"] | wrong}))
    with pytest.raises(BundleSchemaError):
        parse_manifest(json.dumps({**raw, "schema_version": SCHEMA_VERSION}))


@pytest.mark.parametrize("pairs", [[[0.7, -1.0]], [[0.7]] * 3, [[-0.7, 0.0]] * 3, [[0.7, "x"]] * 3, [0.7, -1.0], None])
def test_a_scaling_that_does_not_suit_the_heads_is_refused(pairs: object) -> None:
    with pytest.raises(BundleSchemaError):
        parse_manifest(_changed(("heads", "platt_scaling"), pairs))


def test_a_newer_schema_is_named_before_its_unknown_fields() -> None:
    raw = {**GOOD, "schema_version": SCHEMA_VERSION + 1, "from_the_future": {}}
    with pytest.raises(BundleSchemaError, match="upgrade|reads up to"):
        parse_manifest(json.dumps(raw))


FIELDS = [(name,) for name in GOOD] + [(name, key) for name in ("backbone", "heads", "limits") for key in GOOD[name]]


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_missing_field_is_refused(path: tuple[str, ...]) -> None:
    with pytest.raises(BundleSchemaError):
        parse_manifest(_changed(path, ...))


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
@pytest.mark.parametrize("value", [None, True, 1.5, [1], {"a": []}])
def test_a_mistyped_field_is_refused(path: tuple[str, ...], value: object) -> None:
    if path == ("provenance",) and isinstance(value, dict):
        return
    with pytest.raises(BundleSchemaError):
        parse_manifest(_changed(path, value))


@pytest.mark.parametrize("record", [(), ("backbone",), ("heads",), ("limits",), ("text",), ("files", "onnx/step.onnx")])
def test_an_unknown_field_is_refused(record: tuple[str, ...]) -> None:
    with pytest.raises(BundleSchemaError, match="surprise"):
        parse_manifest(_changed((*record, "surprise"), 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("variants",), {"cpu": "onnx/step.cpu.onnx"}),
        (("variants", "standard"), "onnx/other.onnx"),
        (("variants", "standard"), 5),
        (("heads_graph",), "nowhere.onnx"),
        (("text", "tokenizer"), "tokenizer.json"),
        (("text", "tokenizer"), 5),
        (("text", "chat_template"), ["onnx/step.onnx"]),
        (("text", "eos_token_ids"), "2"),
        (("text", "eos_token_ids"), [2.5]),
        (("text", "eos_token_ids"), None),
        (("text", "special_tokens"), {"bos_token": 1}),
        (("text", "special_tokens"), ["<s>"]),
        (("trees", "default"), [[0, 0]]),
        (("trees", "default"), [[0], [0]]),
        (("trees", "default"), [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]),
        (("trees", "default"), [[99]]),
        (("trees", "default"), 7),
        (("trees", "default"), {"a": 1}),
        (("trees", "other"), [[0, 0]]),
        (("default_tree",), "nameless"),
        (("dtype",), "float64"),
        (("limits", "capacity"), 0),
        (("limits", "batch"), -1),
        (("limits", "cache_rows"), 8),
        (("limits", "max_rows"), 2),
        (("heads", "top_k"), 0),
        (("backbone", "layers"), 0),
        (("files", "onnx/step.onnx"), {"size": "1", "sha256": "0"}),
        (("files", "onnx/step.onnx"), {"size": 1, "sha256": 0}),
        (("files", "onnx/step.onnx"), 3),
        (("schema_version",), 0),
        (("schema_version",), "1"),
        (("schema_version",), True),
    ],
    ids=str,
)
def test_a_field_that_breaks_a_rule_is_refused(path: tuple[str, ...], value: object) -> None:
    with pytest.raises(BundleSchemaError) as caught:
        parse_manifest(_changed(path, value))
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"manifest"',
        "\x00",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"schema_version": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleSchemaError):
        parse_manifest(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BundleSchemaError):
        parse_manifest(b"\xff\xfe\x00\xd8")


def _parses_or_is_refused(text: str | bytes) -> None:
    try:
        read = parse_manifest(text)
    except BundleSchemaError:
        return
    assert isinstance(read, Manifest)
    assert parse_manifest(read.to_json()) == read
    read.tree()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(_json)
def test_any_json_parses_or_is_refused(value: object) -> None:
    _parses_or_is_refused(json.dumps(value))


@given(st.binary(max_size=64))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    _parses_or_is_refused(data)


def _paths(value: object, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [prefix]
    return [prefix] * bool(prefix) + [path for key, inner in value.items() for path in _paths(inner, (*prefix, key))]


@given(st.sampled_from(_paths(GOOD)), _json)
@example(("trees", "default"), [])
@example(("files",), {"\ud800": {"size": 1, "sha256": ""}})
@settings(max_examples=150)
def test_a_manifest_with_anything_in_one_place_parses_or_is_refused(path: tuple[str, ...], value: object) -> None:
    _parses_or_is_refused(_changed(path, value))
