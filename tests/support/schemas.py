"""JSON schemas for tests, made from a seed, and a check of answers that shares no code with any library of grammars.

Their letters are those of :mod:`.text`.
"""

from __future__ import annotations

import random
import re
from typing import Any

COUNT = 200
_NAMES = ["name", "id", "GRÖSSE", "city", "a b", "tags", "x", "PRÉCIS", "kind", "no."]
_TEXTS = ["red", "green", "NAÏVE", "Ünder", 'say "hi"', "back\\slash", "new\nline", "Ý", "a/b", ""]
_PATTERNS = ["^[a-z]{1,4}$", "^[0-9]{2}-[0-9]{2}$", "^(on|off)$", "^[A-F0-9]{4}$", "^x{1,3}y?$|^z$", "^[À-Ý]{1,3}$"]


def schemas(count: int = COUNT) -> list[dict[str, Any]]:
    """Different schemas whose answers are short: nested objects, arrays, enumerations, patterns, references, unicode."""
    return [_schema(random.Random(seed), seed) for seed in range(count)]  # noqa: S311 - for variety


def _schema(rng: random.Random, seed: int) -> dict[str, Any]:
    made = (_object if seed % 4 else _any)(rng, 2)
    if seed % 10 == 7:
        following = {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}
        node = {"type": "object", "properties": {"v": _leaf(rng), "next": following}, "required": ["v", "next"]}
        return {"$ref": "#/$defs/list", "$defs": {"list": {**node, "additionalProperties": False}}}
    return made


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_leaf] * 4 + ([lambda r: _object(r, depth - 1), lambda r: _array(r, depth - 1)] if depth else [])
    return rng.choice(kinds)(rng)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _any(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice([
        {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        {"type": "string", "pattern": rng.choice(_PATTERNS)},
        {"enum": rng.sample(_TEXTS, rng.randint(1, 4))},
        {"enum": [rng.choice(_TEXTS), None, True, rng.randint(-9, 99)]},
        {"const": rng.choice([*_TEXTS, 7, False, None])},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
        {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])},
    ])  # fmt: skip


_FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "time": r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"\d{1,3}(\.\d{1,3}){3}",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "boolean": (bool,), "null": (type(None),), "object": (dict,), "array": (list,),
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Say whether ``value`` is an answer to ``schema``."""
    root = schema if root is None else root
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema and not any(fits(value, each, root) for each in schema["anyOf"]):
        return False
    if "enum" in schema and not any(_same(value, each) for each in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(isinstance(value, _TYPES[each]) and (each == "boolean" or not isinstance(value, bool)) for each in types):
            return False
    if isinstance(value, str):
        form = _FORMATS.get(schema.get("format", ""))
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10_000)
            and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
            and (form is None or re.fullmatch(form, value) is not None)
        )
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10_000) and all(
            fits(each, schema.get("items", {}), root) for each in value
        )
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return (set(schema.get("required", [])) <= set(value) <= set(known) or schema.get("additionalProperties", True)) and all(
            fits(each, known.get(name, {}), root) for name, each in value.items()
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _same(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)
