"""Files that want more than to be read: paths that lead elsewhere, links, pickles under other names, endless templates."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (to make what must be refused)
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime.errors import BundleError, DeployError, HeadsError, TemplateError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.engine_record import parse_engine_record
from medusa_deploy.runtime.files.heads_file import open_heads_folder, write_heads
from medusa_deploy.runtime.files.manifest import parse_manifest
from medusa_deploy.runtime.files.scales_file import read_scales
from medusa_deploy.runtime.text.template import ChatTemplate
from support.records import manifest, write_stub_bundle
from support.tiny import tiny_head_set

ESCAPES = [
    "../secret", "onnx/../../secret", "/etc/hostname", "onnx/../../../../../../etc/hostname", "..", ".", "", "onnx", "\x00",
    "onnx\\..\\secret", "onnx/step.onnx\x00.txt", "~/secret", "file:///etc/hostname", "C:\\secret", "./../secret",
    "onnx//..//..//secret", "a" * 5000,
]  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(b"secret")
    return write_stub_bundle(tmp_path / "bundle")


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the manifest."""
    path = bundle / "manifest.json"
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw), "utf-8")
    return bundle


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("place", ["variants", "heads_graph", "engines", "tokenizer", "chat_template", "files"])
def test_no_name_leads_out_of_a_bundle(bundle: Path, name: str, place: str) -> None:
    secret = {"size": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}

    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = secret
        if place in ("tokenizer", "chat_template"):
            raw["text"][place] = name
        elif place == "heads_graph":
            raw[place] = name
        elif place != "files":
            raw[place]["x"] = name

    with pytest.raises(BundleError) as caught:
        open_bundle(rewritten(bundle, change))
    assert caught.value.hint


@pytest.mark.parametrize("target", ["secret", "bundle/onnx/heads.onnx", "nothing", "bundle/onnx/step.onnx"])
def test_no_link_is_followed(bundle: Path, target: str) -> None:
    path = bundle / "onnx" / "step.onnx"
    path.unlink()
    path.symlink_to(bundle.parent / target)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert caught.value.hint


class _Runs:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def _heads(data: bytes, folder: Path, name: str) -> None:
    write_heads(tiny_head_set(), folder / "heads")
    (folder / "heads" / name).write_bytes(data)
    open_heads_folder(folder / "heads")


def _published(data: bytes, folder: Path, name: str) -> None:
    pytest.importorskip("torch")
    from medusa_deploy.export.heads.layouts import read_heads

    (folder / name).write_bytes(data)
    read_heads(folder)


def _scales(data: bytes, folder: Path, name: str) -> None:
    (folder / name).write_bytes(data)
    read_scales(folder / name, manifest())


READERS: dict[str, Callable[[bytes, Path, str], object]] = {
    "heads.safetensors": _heads,
    "config.json": _heads,
    "medusa_lm_head.safetensors": _published,
    "medusa_lm_head.pt": _published,
    "medusa_lm_head.bin": _published,
    "scales.json": _scales,
    "manifest.json": lambda data, _folder, _name: parse_manifest(data),
    "engine.json": lambda data, _folder, _name: parse_engine_record(data),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_under_another_name_does_not_run(name: str, protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(_Runs(tmp_path / "ran"), protocol)
    for disguise in (data, len(data).to_bytes(8, "little") + data, b"{}" + data, b"PK\x03\x04" + data):
        with pytest.raises(DeployError) as caught:
            READERS[name](disguise, tmp_path, name)
        assert caught.value.hint
        for path in tmp_path.iterdir():
            if path.is_dir():
                for inner in path.iterdir():
                    inner.unlink()
                path.rmdir()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [2**31, 10**12, 2**64])
def test_a_config_of_too_many_heads_takes_no_memory(number: int, tmp_path: Path) -> None:
    for name in ("num_heads", "num_layers"):
        write_heads(tiny_head_set(), tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), name: number}), "utf-8")
        with pytest.raises(HeadsError, match="the limit is"):
            open_heads_folder(tmp_path / name)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(10**12) %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ '{:.9999999999f}'.format(1.5) }}",
        "{{ ('{:>9999}' * 9999).format(*([1] * 9999)) }}",
        "{{ '{0.__class__.__mro__}'.format('a') }}",
        "{{ '{0[__class__]}'.format({}) }}",
        "{{ ['a' * 99999] * 99999 }}",
        "{% set x = ['a' * 99999] %}{{ (99999 * x)|join }}",
        "{{ (messages * 999999)|tojson }}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = ns.x * 99 %}{% endfor %}{{ ns.x }}",
        "(" * 100_000,
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{{" + "[" * 5000 + "]" * 5000 + "}}",
        "{{ 1" + " + 1" * 50_000 + " }}",
        "{{ " + "not " * 50_000 + "1 }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ 1" + " ~ 1" * 50_000 + " }}",
        "{% if 1 %}" + "{% elif 1 %}" * 50_000 + "{% endif %}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('id') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_bomb_is_defused(source: str) -> None:
    began = time.process_time()
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    except TemplateError as error:
        text = error.hint
    assert text is not None
    assert "root:" not in text
    assert "uid=" not in text
    assert time.process_time() - began < 10
