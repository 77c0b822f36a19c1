"""Thousands of damaged and malicious files: each is refused by a named error in time, or read as what it says."""

from __future__ import annotations

import json
import math
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.mutants import Mutate, mutate_any_json, mutate_bytes, mutate_text
from medusa_deploy.runtime.errors import DeployError, UsageError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.engine_record import BuildLog, EngineRecord, Profile, TensorRecord, parse_engine_record
from medusa_deploy.runtime.files.heads_file import open_heads_folder, write_heads
from medusa_deploy.runtime.files.manifest import parse_manifest
from medusa_deploy.runtime.files.scales_file import ActivationScale, Layer, Scales, Smoothing, model_digest, read_scales
from medusa_deploy.runtime.grammar import Grammar, GrammarKind
from medusa_deploy.runtime.text.template import ChatTemplate
from medusa_deploy.runtime.tree import Tree
from support.fake_executor import fake_session
from support.records import manifest, write_stub_bundle
from support.text import TEMPLATE
from support.tiny import tiny_head_set

_VERSIONS = ("schema_version", "record_version")  # what an older version says is read as the newest one says it
_SECONDS = 2.0  # of this process: others may stop it


@dataclass(frozen=True)
class Subject:
    """A good file, how it is changed, and what reads it. ``read`` returns what it understood, as JSON where it can be compared.

    ``small``, ``full``: numbers of mutants.
    """

    name: str
    good: bytes
    mutate: Mutate
    read: Callable[[bytes], Any]
    small: int
    full: int


def means_the_same(read: Any, written: Any) -> bool:
    """Whether what was read says all that was written. It may add fields that have defaults."""
    if isinstance(written, dict) and isinstance(read, dict):
        return all(key in read and means_the_same(read[key], value) for key, value in written.items() if key not in _VERSIONS)
    if isinstance(written, list) and isinstance(read, list):
        return len(read) == len(written) and all(map(means_the_same, read, written))
    if isinstance(written, (int, float)) and isinstance(read, float):
        return math.isclose(read, written, rel_tol=1e-6, abs_tol=1e-30) or (math.isnan(read) and math.isnan(written))
    return bool(read == written)


def _checked(error: DeployError) -> str:
    """Return the name of an error that says what is wrong and what to do, and not too much."""
    assert str(error), f"{error!r} has no message"
    assert error.hint, f"{error!r} has no hint"
    assert len(str(error)) < 2000, f"{str(error)[:200]}… is {len(str(error))} characters long"
    return type(error).__name__


def run(subject: Subject, count: int) -> Counter[str]:
    """Try so many mutants; return how often each error came, and how often none did."""
    chance, ends = random.Random(subject.name), Counter[str]()  # noqa: S311 - no secret
    for _ in range(count):
        mutant = subject.mutate(subject.good, chance)
        began = time.process_time()
        try:
            read = subject.read(mutant)
        except DeployError as error:
            ends[_checked(error)] += 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {mutant[:3000]!r}") from error
        else:
            ends["read"] += 1
            if read is not None:
                assert means_the_same(read, json.loads(mutant)), f"{read} was read from {mutant[:3000]!r}"
        assert time.process_time() - began < _SECONDS, mutant[:3000]
    return ends


# -- subjects ------------------------------------------------------------------------------------------------------


def _scales() -> bytes:
    maxima = np.array([0.0, 3.25, 1e-20], np.float32)
    found = Scales(
        "max",
        {"q": Layer("x", "w", 1), "k": Layer("x", "v", 0)},
        {"x": ActivationScale(0.5, 63.5, 200, 0.0, 0.25, 0.01, maxima)},
        {("w", 1): np.array([0.1, 0.2], np.float32), ("v", 0): np.array([1.0], np.float32)},
        {"model_sha256": model_digest(manifest()), "prompts": 3},
        {"x": {grid: Smoothing(0.6, 1e-5, 2e-5, np.full(3, 0.1, np.float32)) for grid in ("block", "tensor")}},
    )
    return found.to_json().encode()


def _read_scales(folder: Path) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        (folder / "scales.json").write_bytes(data)
        return json.loads(read_scales(folder / "scales.json", manifest()).to_json())

    return read


def _read_tree(folder: Path) -> Callable[[bytes], Any]:
    from medusa_deploy.tools.tree_set import read_tree

    def read(data: bytes) -> Any:
        (folder / "tree.json").write_bytes(data)
        read_tree(folder / "tree.json", manifest())

    return read


def _read_template(data: bytes) -> Any:
    template = ChatTemplate(data.decode("utf-8", "surrogatepass"), {"bos_token": "<s>"})
    assert isinstance(template.render([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]), str)


def _read_header(folder: Path) -> Callable[[bytes], Any]:
    from medusa_deploy.export.backbone.safetensors_header import read_header

    def read(data: bytes) -> Any:
        path = folder / "model.safetensors"
        path.write_bytes(data)
        found = read_header(path)
        for tensor in found.values():
            assert tensor.mapped().nbytes == tensor.nbytes and tensor.offset + tensor.nbytes <= len(data)

    return read


def _read_heads(folder: Path, name: str) -> Callable[[bytes], Any]:
    write_heads(tiny_head_set(), folder / "heads", {"trees": {"default": [[0], [0, 1]]}})

    def read(data: bytes) -> Any:
        (folder / "heads" / name).write_bytes(data)
        heads, _ = open_heads_folder(folder / "heads")
        heads.validate()

    return read


def _read_bundle(folder: Path, name: str) -> Callable[[bytes], Any]:
    """Put a file among a bundle's own. Hashes say whether its content is what it was."""

    def read(data: bytes) -> Any:
        (folder / name).write_bytes(data)
        bundle = open_bundle(folder)
        assert name == "manifest.json" or data == _GRAPH, "a changed file was opened"
        assert all(bundle.path(each).is_relative_to(folder) for each in bundle.manifest.files)

    return read


def _read_api(data: bytes) -> Any:
    pytest.importorskip("starlette")
    from medusa_deploy.runtime.serve.errors import ApiError
    from medusa_deploy.runtime.serve.fields import ChatFields, parse

    try:
        fields, _ = parse(data, ChatFields)
        fields.sampling(128, 0)
        assert fields.prompts and fields.stops is not None
    except ApiError as error:
        raise UsageError(error.message, hint="400" if error.status == 400 else "") from None


def _read_grammar(folder: Path, kind: GrammarKind) -> Callable[[bytes], Any]:
    """Compile it, and go some steps."""
    pytest.importorskip("llguidance")
    session = fake_session(text_folder=folder)

    def read(data: bytes) -> Any:
        matcher = session.grammars.matcher(Grammar(kind, data.decode("utf-8", "replace")), frozenset({2}))
        for step in range(30):
            allowed = np.flatnonzero(matcher.allowed())
            token = int(allowed[step % len(allowed)])
            if token == 2 or matcher.finished():
                break
            matcher.advance([token])

    return read


_SCHEMA = json.dumps({
    "type": "object", "required": ["a"], "additionalProperties": False,
    "$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]{1,5}$", "maxLength": 4}, "b": {"enum": ["x", 1, None]},
        "c": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "d": {"$ref": "#/$defs/n"},
    },
}).encode()  # fmt: skip
_LARK = b'start: greeting ("," name)* "!"\ngreeting: "hello" | "good" /[a-z]+/\nname: /[A-Z][a-z]{1,10}/ | "(" name ")"\n'
_REGEX = rb"(ab|c[d-f]{2,5})*(x+y?|[^a-z]{3})(?:foo|bar)\d{1,3}"


def _safetensors() -> bytes:
    pytest.importorskip("safetensors")
    from safetensors.numpy import save

    return save({"a.weight": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.float16)}, {"format": "pt"})


def mutate_header(good: bytes, chance: random.Random) -> bytes:
    """Change the header's JSON and keep its length right, or change bytes anywhere."""
    if chance.random() < 0.3:
        return mutate_bytes(good, chance)
    length = int.from_bytes(good[:8], "little")
    header = mutate_any_json(good[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + good[8 + length :]


_GRAPH = b"the bytes of onnx/step.onnx"
_TREE = json.dumps(Tree.from_choices([[0], [1], [0, 0], [0, 1], [0, 0, 0]]).choices()).encode()
_CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "x"}],
    "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "n": 2, "logit_bias": {"5": -1.5}, "logprobs": True,
    "top_logprobs": 3, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "metadata": {"a": "b"},
}  # fmt: skip


def subjects(folder: Path) -> list[Subject]:
    """All of them; ``folder`` is for their files."""
    names = ("scales", "tree", "schema", "lark", "regex", "heads", "tensors", "header", "bundle", "file")
    places = {name: folder / name for name in names}
    for place in places.values():
        place.mkdir()
    for name in ("bundle", "file"):
        write_stub_bundle(places[name])
    stub = (places["bundle"] / "manifest.json").read_bytes()
    write_heads(tiny_head_set(), folder / "good", {"trees": {"default": [[0], [0, 1]]}})
    config, tensors = ((folder / "good" / name).read_bytes() for name in ("config.json", "heads.safetensors"))
    return [
        Subject("manifest", stub, mutate_any_json, lambda data: json.loads(parse_manifest(data).to_json()), 150, 5000),
        Subject("bundle", stub, mutate_any_json, _read_bundle(places["bundle"], "manifest.json"), 80, 2500),
        Subject("file of a bundle", _GRAPH, mutate_bytes, _read_bundle(places["file"], "onnx/step.onnx"), 40, 1000),
        Subject("tree", _TREE, mutate_any_json, _read_tree(places["tree"]), 150, 4000),
        Subject("scales", _scales(), mutate_any_json, _read_scales(places["scales"]), 150, 4000),
        Subject("template", TEMPLATE.encode(), mutate_text, _read_template, 100, 3000),
        Subject("safetensors header", _safetensors(), mutate_header, _read_header(places["header"]), 120, 4000),
        Subject("heads config", config, mutate_any_json, _read_heads(places["heads"], "config.json"), 80, 2000),
        Subject("heads tensors", tensors, mutate_header, _read_heads(places["tensors"], "heads.safetensors"), 60, 1500),
        Subject("engine record", _engine_record(), mutate_any_json, _read_engine_record, 80, 2000),
        Subject("schema", _SCHEMA, mutate_any_json, _read_grammar(places["schema"], "json_schema"), 60, 2000),
        Subject("lark grammar", _LARK, mutate_text, _read_grammar(places["lark"], "lark"), 40, 1000),
        Subject("regular expression", _REGEX, mutate_text, _read_grammar(places["regex"], "regex"), 40, 1000),
        Subject("chat request", json.dumps(_CHAT).encode(), mutate_any_json, _read_api, 150, 4000),
    ]


def _engine_record() -> bytes:
    sizes = (1, 4, 8)
    record = EngineRecord(
        "tensorrt", "10.9.0", "sm_89", "fp16", "inside", "step.plan", "heads.plan", "0" * 64,
        (Profile("decode", sizes, sizes, sizes, sizes, sizes),), (TensorRecord("tokens", "int64", (-1, -1)),),
        (TensorRecord("logits", "float32", (-1, -1, 128)),), ("a warning",), "device", ("strongly_typed",),
        {"onnx/step.onnx": "0" * 64}, {"tensorrt": "10.9.0"}, {"step.plan": BuildLog("0" * 64, 10, 2, 0.5, 1.5, 1 << 20, 1024)},
    )  # fmt: skip
    return record.to_json().encode()


def _read_engine_record(data: bytes) -> Any:
    return json.loads(parse_engine_record(data).to_json())


_NAMES = [
    "manifest", "bundle", "file of a bundle", "tree", "scales", "template", "safetensors header", "heads config", "heads tensors",
    "engine record", "schema", "lark grammar", "regular expression", "chat request",
]  # fmt: skip


@pytest.mark.parametrize("name", _NAMES)
def test_a_mutant_is_refused_or_read_as_what_it_says(
    name: str, tmp_path: Path, amount: Callable[[int, int], int], figures: dict[str, Any]
) -> None:
    [subject] = [each for each in subjects(tmp_path) if each.name == name]
    read = subject.read(subject.good)
    assert read is None or means_the_same(read, json.loads(subject.good))
    count = amount(subject.small, subject.full)
    figures.setdefault("mutants", {})[name] = {"mutants": count, "ends": dict(sorted(run(subject, count).items()))}
