"""What libraries raise while a backbone is traced, converted or run ends as a named error, and the full log is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from medusa_deploy.export import graphs
from medusa_deploy.export.backbone.refusal.causes import deepest, first_lines
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import TraceError, UnsupportedArchitectureError
from medusa_deploy.tools import cli

MLP = modeling_llama.LlamaMLP.forward


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that logs are written to."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def export(model: Path, tmp_path: Path) -> None:
    try:
        export_bundle(model, None, tmp_path / "bundle", capacity=64)
    finally:
        assert not list(tmp_path.glob("*bundle*"))


def broken_mlp(module: Any, states: torch.Tensor) -> torch.Tensor:
    if not states.is_meta:
        raise ValueError("\n\nno such weather:\nrain\nand more")
    return MLP(module, states)


def test_a_module_that_fails_in_the_trace_is_named(
    tiny_model: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", broken_mlp)
    with pytest.raises(TraceError) as caught:
        export(tiny_model, tmp_path)
    assert caught.value.message == (
        "llama (LlamaForCausalLM) can't be traced: model.layers.0.mlp (LlamaMLP) raises ValueError: no such weather: rain"
    )
    (log,) = logs.iterdir()
    assert str(log) in caught.value.hint
    text = log.read_text("utf-8")
    assert "Traceback" in text and "and more" in text and '"hidden_size": 64' in text and "torch 2" in text


@pytest.mark.slow
def test_an_operator_without_a_translation_is_named(
    tiny_model: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda module, x: MLP(module, x) + torch.special.bessel_j0(x))
    with pytest.raises(TraceError, match=r"can't be traced: .*layers.0.mlp \(LlamaMLP\) raises .*bessel_j0"):
        export(tiny_model, tmp_path)


def test_a_refusal_inside_the_trace_stays_a_refusal(
    tiny_model: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(module: Any, states: torch.Tensor) -> torch.Tensor:
        if not states.is_meta:
            raise UnsupportedArchitectureError("not this one", hint="another")
        return MLP(module, states)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", refuses)
    with pytest.raises(UnsupportedArchitectureError, match="not this one") as caught:
        export(tiny_model, tmp_path)
    assert caught.value.hint == "another"
    assert list(logs.iterdir()) == []


def test_a_pass_that_fails_is_named_and_the_program_ends_with_1(
    tiny_model: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("rotary")

    monkeypatch.setattr(graphs, "trace_step", fails)
    arguments = ["export", str(tiny_model), "--no-heads", "-o", str(tmp_path / "bundle"), "--capacity", "64"]
    assert cli.main(arguments) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert "llama (LlamaForCausalLM) can't be lowered" in shown and "KeyError: 'rotary'" in shown and str(logs) in shown
    assert "Traceback" not in shown and "bug" not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo", "ValueError: one"),
        ("\n  \n***\ntwo", "ValueError: two"),
        ("why:\nbecause:\n it rains\nand more", "ValueError: why: because: it rains"),
        ("", "ValueError, without a message"),
        ("x" * 400, f"ValueError: {'x' * 300} …"),
    ],
)
def test_the_first_line_says_something(text: str, shown: str) -> None:
    assert first_lines(ValueError(text)) == shown


def test_several_lines_are_counted_and_a_report_speaks_for_the_message_that_refers_to_it() -> None:
    report = "model: done\na.weight | MISMATCH | [1] and [2] \nb | MISSING | it is\n"
    error = RuntimeError("see the \x1b[1mreport above\x1b[0m")
    assert first_lines(error, 4, report) == "RuntimeError: a.weight: mismatch, [1] and [2] b: missing, it is"
    assert first_lines(error, 4) == "RuntimeError: see the report above"
    assert first_lines(ValueError("a\n--\nb\nc:\nd\ne"), 3) == "ValueError: a b c: d … (1 more lines)"


def test_the_deepest_error_is_the_first_cause() -> None:
    first, second = KeyError("first"), ValueError("second")
    second.__cause__ = first
    assert deepest(second) is first
    first.__cause__ = second  # a circle
    assert deepest(second) is first
