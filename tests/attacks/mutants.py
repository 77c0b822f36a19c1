"""Changes good files at random: bytes of any file, values and structure of JSON, pieces of text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), "",
    "x", "..", "../x", "/etc/passwd", "a\x00b", "\ud800", "é" * 300, "9" * 5000, [], {}, [[]], [0], [None], {"": None}, {"x": {}},
    [[0, 0], [0]],
]  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All pairs of a container and a key in it."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def mutate_json(good: bytes, chance: random.Random) -> bytes:
    """Replace, remove, rename, copy, nest or exchange one to three values."""
    document = [json.loads(good)]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        container, key = chance.choice(places)
        value = container[key]
        match chance.randrange(8):
            case 0 | 1:
                container[key] = copy.deepcopy(chance.choice(_ODD))
            case 2 if isinstance(container, dict):
                del container[key]
            case 3 if isinstance(container, dict):
                container[chance.choice([str(key) + " ", str(key).upper(), "", "x", "__class__"])] = container.pop(key)
            case 4:
                other, at = chance.choice(places)
                container[key] = copy.deepcopy(other[at])
            case 5:
                container[key] = {"x": value} if chance.random() < 0.5 else [value] * chance.randint(1, 3)
            case 6 if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers = [value + 1, value - 1, -value, value * 2, str(value)[:4000], not value]
                container[key] = chance.choice([*numbers, value * 1e9, float(value)] if abs(value) < 1e300 else numbers)
            case 7 if isinstance(value, str):
                container[key] = chance.choice([value[:-1], value * 2, value.upper(), value + "\n", "./" + value, ascii(value)])
            case _ if isinstance(container, list):
                container[key:key + 1] = chance.choice([[], [value, copy.deepcopy(value)], [container[-1]]])
        if not document:
            break
    return json.dumps(document[0] if document else None).encode()


def mutate_bytes(good: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert, repeat or exchange bytes, at the beginning more often than elsewhere."""
    data = bytearray(good)
    for _ in range(chance.choice([1, 1, 2, 4])):
        place = int(len(data) * chance.random() ** chance.choice([1, 3]))
        end = place + chance.choice([1, 1, 4, 8, 40])
        match chance.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place:end] = chance.randbytes(end - place)
            case 2:
                del data[place:end]
            case 3:
                del data[place:]
            case 4:
                odd = [b"\x00" * 8, b"\xff" * 8, b"[" * 5000, b'{"a":' * 3000, b"\\u0000", bytes(data[:40])]
                data[place:place] = chance.choice(odd)
            case _:
                data += chance.choice([b"\x00", b" ", bytes(data[place:end])])
    return bytes(data)


def nest_json(good: bytes, chance: random.Random) -> bytes:
    """Put a value that is nested too deep, or too long, somewhere."""
    text = good.decode()
    place = chance.choice([index for index, letter in enumerate(text) if letter in "[{:"]) + 1
    deep = chance.choice(["[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900, "1" * 10_000, '"' + "x" * 100_000 + '"'])
    return (text[:place] + deep + text[place:]).encode()


def mutate_any_json(good: bytes, chance: random.Random) -> bytes:
    """Mostly as :func:`mutate_json`, sometimes as one of the others."""
    return chance.choices([mutate_json, mutate_bytes, nest_json], [8, 3, 1])[0](good, chance)


_PIECES = [
    "{{", "}}", "{%", "%}", "{#", "#}", "{%-", "-%}", "{{ ''.__class__.__mro__ }}", "{% for x in range(10**9) %}", "{% endfor %}",
    "{{ 'a' * 10**9 }}", "{% include '/etc/passwd' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "not ",
    "{% set ns = namespace(x=1) %}",
    "{{ messages | tojson }}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "loop.index0", "[::-1]", "is defined",
    "{{ messages[0]['content'].split('a') | map('upper') | join('-') }}", "{{ (1, 2) ~ 3 }}", "'", '"', "\\", "\x00", "\ud7ff",
    "(" * 200,
]  # fmt: skip


def mutate_text(good: bytes, chance: random.Random) -> bytes:
    """Cut, move, repeat and insert pieces of a template's own and of others."""
    text = good.decode()
    for _ in range(chance.choice([1, 1, 2, 3])):
        place, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        end = min(end, place + chance.choice([1, 3, 20]))
        match chance.randrange(4):
            case 0:
                text = text[:place] + text[end:]
            case 1:
                text = text[:place] + chance.choice(_PIECES) + text[place:]
            case 2:
                text = text[:place] + text[place:end] * chance.choice([2, 3]) + text[end:]
            case _:
                text = text[:place] + chance.choice(_PIECES) + text[end:]
    return text.encode("utf-8", "surrogatepass")
