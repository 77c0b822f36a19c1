"""The demo: set-up is done once and redone when it must be; the show prints live text and writes both reports."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_deploy.runtime import Session, load
from medusa_deploy.runtime.errors import HeadsError
from medusa_deploy.runtime.files.bundle import record_files
from medusa_deploy.runtime.files.manifest import MANIFEST_NAME, parse_manifest
from medusa_deploy.runtime.text.prompts import PromptLine
from medusa_deploy.tools.making import demo_bundle
from medusa_deploy.tools.making.demo_bundle import HEADS, ensure_bundle, ensure_int8
from medusa_deploy.tools.verbs import demo as module
from medusa_deploy.tools.verbs.demo import pick_prompts, show
from support.text import write_text_files


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was prepared and exported, by stand-ins that leave the files that count."""
    done: list[str] = []

    def prepare(output: Path, **_options: Any) -> None:
        done.append("prepare")
        output.mkdir(parents=True)
        (output / "config.json").write_text("{}")

    def export(model: Path, heads: Path, output: Path, **options: Any) -> None:
        assert (model / "config.json").is_file()
        assert options["force"] or not output.exists()
        done.append("export")
        output.mkdir(exist_ok=True)
        (output / MANIFEST_NAME).write_text(f"{heads} {len(done)}")

    monkeypatch.setattr("medusa_deploy.tools.making.smollm2.prepare_smollm2", prepare)
    monkeypatch.setattr("medusa_deploy.export.exporter.export_bundle", export)
    return done


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    folder = tmp_path / "heads"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "heads.safetensors").write_bytes(b"weights")
    return folder


def test_the_bundle_is_made_once(made: list[str], heads: Path, tmp_path: Path):
    build = tmp_path / "build"
    assert ensure_bundle(build, heads) == ensure_bundle(build, heads) == build / "smollm2-bundle"
    assert made == ["prepare", "export"]


def test_other_heads_make_another_bundle_of_the_same_model(made: list[str], heads: Path, tmp_path: Path):
    build = tmp_path / "build"
    ensure_bundle(build, heads)
    (heads / "heads.safetensors").write_bytes(b"others!")
    ensure_bundle(build, heads)
    ensure_bundle(build, heads)
    assert made == ["prepare", "export", "export"]


def test_another_version_makes_another_bundle(made: list[str], heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ensure_bundle(tmp_path / "build", heads)
    monkeypatch.setattr("medusa_deploy.__version__", "99.0")
    ensure_bundle(tmp_path / "build", heads)
    assert made == ["prepare", "export", "export"]


@pytest.mark.parametrize("damage", ["bundle", "stamp", "manifest"])
def test_what_is_missing_or_replaced_is_made_again(made: list[str], heads: Path, tmp_path: Path, damage: str):
    build = tmp_path / "build"
    bundle = ensure_bundle(build, heads)
    match damage:
        case "bundle":
            (bundle / MANIFEST_NAME).unlink()
        case "stamp":
            (build / "smollm2-bundle.json").write_text('{"recipe"')
        case _:
            (bundle / MANIFEST_NAME).write_text("another bundle")
    ensure_bundle(build, heads)
    assert made == ["prepare", "export", "export"]


def test_an_export_that_fails_leaves_no_stamp(made: list[str], heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build = tmp_path / "build"
    ensure_bundle(build, heads)
    (heads / "heads.safetensors").write_bytes(b"others!")

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr("medusa_deploy.export.exporter.export_bundle", fail)
        with pytest.raises(RuntimeError):
            ensure_bundle(build, heads)
    ensure_bundle(build, heads)
    assert made == ["prepare", "export", "export"]


def test_missing_heads_are_named(tmp_path: Path):
    with pytest.raises(HeadsError, match="no heads at") as caught:
        ensure_bundle(tmp_path / "build", tmp_path / "nowhere")
    assert "--heads" in caught.value.hint


def test_demo_sets_up_then_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr(demo_bundle, "ensure_bundle", lambda *given: calls.append(given[:2]) or tmp_path)
    monkeypatch.setattr(demo_bundle, "ensure_int8", lambda *given: calls.append(given))
    monkeypatch.setattr("medusa_deploy.runtime.session.load", lambda bundle, **options: f"session of {bundle} {options}")
    monkeypatch.setattr(module, "show", lambda *given: calls.append(given) or {"verify": {"unexplained": 0}})
    monkeypatch.setattr(module, "_recommend", lambda sessions, *_given: list(sessions))
    screen = io.StringIO()
    assert module.demo(tmp_path, screen=screen) == {"verify": {"unexplained": 0}, "recommend": ["cpu", "cpu-int8"]}
    assert calls.pop() == (tmp_path / "build", tmp_path)
    session, prompts, output, shown_on = calls[1]
    assert calls[0] == (tmp_path / "build", tmp_path / HEADS)
    assert (session, output, shown_on) == (
        f"session of {tmp_path} {{'prefix_cache': False}}",
        tmp_path / "build" / "demo",
        screen,
    )
    assert len(prompts) == len({line.category for line in prompts}) == module.PROMPTS


def test_a_variant_more_is_no_reason_to_export_again(
    made: list[str], heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build = tmp_path / "build"
    bundle = ensure_bundle(build, heads)
    variants: dict[str, str] = {}
    opened = SimpleNamespace(manifest=SimpleNamespace(variants=variants))
    monkeypatch.setattr("medusa_deploy.runtime.files.bundle.open_bundle", lambda *_given, **_options: opened)
    monkeypatch.setattr("medusa_deploy.tools.making.scales.calibrate", lambda *_given, **_options: made.append("calibrate"))

    def quantise(where: Path, _scales: Path, *, name: str) -> None:
        made.append("quantise")
        variants[name] = "graph"
        (where / MANIFEST_NAME).write_text("with a variant more")

    monkeypatch.setattr("medusa_deploy.tools.making.variant.quantise", quantise)
    for _ in range(2):
        ensure_int8(build, bundle)
        ensure_bundle(build, heads)
    assert made == ["prepare", "export", "calibrate", "quantise"]


def test_prompts_are_of_different_categories():
    lines = pick_prompts(5)
    assert len({line.category for line in lines}) == 5


@pytest.fixture
def talking_session(bundle_copy: Path) -> Session:
    """The tiny bundle with a tokenizer and a chat template."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("minijinja")
    plain = parse_manifest((bundle_copy / MANIFEST_NAME).read_bytes())
    text = write_text_files(bundle_copy, eos_token_ids=plain.text.eos_token_ids)
    complete = replace(plain, text=text, files=record_files(bundle_copy))
    (bundle_copy / MANIFEST_NAME).write_text(complete.to_json())
    return load(bundle_copy, threads=1)


LINES = [
    PromptLine(messages=({"role": "user", "content": "Why is the sky blue?"},), category="reasoning"),
    PromptLine(messages=({"role": "user", "content": "Write a haiku."},), category="writing"),
]


def test_the_show_answers_live_and_reports(talking_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_NEW_TOKENS", 24)
    monkeypatch.setattr(module, "_VERIFY_TOKENS", 6)
    monkeypatch.delenv("NO_COLOR", raising=False)
    # How many rows pay is a matter of measured times: a fixed number accepts the same tokens on every machine.
    stream = talking_session.stream
    fixed = {True: {"rows": 8}, False: {}}
    monkeypatch.setattr(talking_session, "stream", lambda **o: stream(**(fixed[o.get("speculative", True)] | o)))
    screen = Terminal()
    reports = show(talking_session, LINES, tmp_path / "demo", screen)
    shown = screen.getvalue()
    answer = talking_session.generate(messages=LINES[0].messages, max_new_tokens=24).text
    assert f"[plain] {module._RESET}{answer}\n" in shown
    assert module._DRAFTED in shown, "accepted drafted tokens stand out"
    assert answer in shown.replace(module._DRAFTED, "").replace(module._RESET, "").split("[Medusa] ")[1]
    assert "tokens/s with Medusa" in shown
    assert "no unexplained divergence" in shown
    for name in ("bench", "verify"):
        written = json.loads((tmp_path / "demo" / f"{name}.json").read_text())
        assert written["environment"]["cpu"]
        assert written["prompts"] == len(LINES) == reports[name]["prompts"]
    assert set(reports["verify"]["trees"]) == {"root", "chain", "published", "narrow", "wide", "random", "best-rows", "automatic"}


@pytest.mark.parametrize("screen", [io.StringIO(), Terminal()])
def test_no_colour_where_it_is_not_wanted(
    talking_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: io.StringIO
):
    monkeypatch.setattr(module, "_MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(module, "_VERIFY_TOKENS", 2)
    monkeypatch.setenv("NO_COLOR", "1")
    show(talking_session, LINES[:1], tmp_path / "demo", screen)
    assert "\x1b" not in screen.getvalue()
