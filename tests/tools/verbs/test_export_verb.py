"""The verb export: its plan, its report, and what it refuses before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.tools.cli import USAGE, USER_ERROR, main

SIZES = ["--capacity", "256", "--batch", "4", "--top-k", "4", "--max-rows", "16"]


@pytest.fixture(autouse=True)
def _needs_export() -> None:
    for name in ("torch", "transformers", "onnx", "onnxscript"):
        pytest.importorskip(name)


def test_a_dry_run_sizes_the_bundle_and_writes_nothing(
    tiny_model: Path, tiny_heads: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tiny_model / "model.safetensors"
    hidden = weights.rename(weights.with_suffix(".away"))
    try:
        output = tmp_path / "bundle"
        code = main(
            ["export", str(tiny_model), "--heads", str(tiny_heads), "-o", str(output), *SIZES, "--dry-run", "--json", "-"]
        )
    finally:
        hidden.rename(weights)
    assert code == 0
    plan = json.loads(capsys.readouterr().out)
    manifest = open_bundle(tiny_bundle).manifest
    assert not output.exists()
    assert plan["cache_rows"] == manifest.limits.cache_rows
    assert plan["cache_bytes"] == 4 * plan["cache_bytes_per_slot"]
    assert (plan["tree_rows"], plan["tree_depth"]) == (manifest.tree().rows, manifest.tree().depth)
    assert plan["parameters"] == 82240
    written = sum(record.size for record in manifest.files.values())
    assert plan["bundle_bytes"] == pytest.approx(written, rel=0.3)


def test_an_export_prints_its_checks_and_keeps_the_given_tree(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, output, report = tmp_path / "tree.json", tmp_path / "bundle", tmp_path / "report.json"
    tree.write_text("[[0], [1], [0, 0]]", "utf-8")
    options = ["--tree", str(tree), "--json", str(report), "--capacity", "64", "--top-k", "4", "--max-rows", "8"]
    assert main(["export", str(tiny_model), "--heads", str(tiny_heads), "-o", str(output), *options]) == 0
    shown = capsys.readouterr()
    assert "max logit error" in shown.out
    assert "argmax agreement" in shown.out
    assert f"{output}  " in shown.out
    assert shown.err == "warning: the model has no tokenizer: the bundle takes token ids only\n"
    read = json.loads(report.read_text("utf-8"))
    assert set(read["check"]) == {"standard", "cpu", "device"}
    assert open_bundle(output).manifest.tree().choices() == [[0], [1], [0, 0]]


def test_an_existing_output_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere", "--no-heads", "-o", str(tmp_path)]) == USER_ERROR
    shown = capsys.readouterr().err
    assert f"{tmp_path} exists" in shown
    assert "--force" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 0]]", "path [0, 0] has no parent [0]"),
        ("{}", "holds a dict"),
        ("[[0], [0]]", "occurs twice"),
        ("[", "is not JSON"),
        ("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]", "the tree is 4 deep, and there are 3 heads"),
        ("[[12]]", "the tree uses rank 12"),
    ],
)
def test_a_wrong_tree_is_a_message(
    text: str, message: str, tiny_model: Path, tiny_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(text, "utf-8")
    output = tmp_path / "bundle"
    arguments = ["export", str(tiny_model), "--heads", str(tiny_heads), "-o", str(output), "--tree", str(tree), "--dry-run"]
    assert main(arguments) == USER_ERROR
    shown = capsys.readouterr().err
    assert message in shown
    assert "hint: " in shown
    assert not output.exists()


def test_a_missing_model_or_tree_is_a_message(tiny_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "bundle"), "--dry-run"]
    assert main(["export", str(tmp_path / "none"), "--heads", str(tiny_heads), *output]) == USER_ERROR
    assert "no such model" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--no-heads", "--tree", str(tmp_path / "none.json"), *output]) == USER_ERROR
    assert "none.json can't be read: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "-o", "b"],
        ["m", "-o", "b", "--heads", "h", "--no-heads"],
        ["m", "--no-heads"],
        ["m", "-o", "b", "--no-heads", "--batch", "0"],
        ["m", "-o", "b", "--no-heads", "--dtype", "int3"],
    ],
)
def test_incomplete_or_contradictory_options_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == USAGE
    assert "usage: medusa-deploy export" in capsys.readouterr().err
