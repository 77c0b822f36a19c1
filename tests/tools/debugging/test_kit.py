"""Kits for polygraphy: its own programs read them, and a fault put into one layer is found in that layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

from medusa_deploy.export.exporter import export_bundle  # noqa: E402
from medusa_deploy.runtime.errors import UsageError  # noqa: E402
from medusa_deploy.tools.cli import main  # noqa: E402
from medusa_deploy.tools.debugging.comparison import compare_kit  # noqa: E402
from medusa_deploy.tools.debugging.results_file import read_results, write_results  # noqa: E402

pytestmark = pytest.mark.slow
FAULTY_LAYER = 1


@pytest.fixture(scope="module")
def kit(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of the tiny bundle in fp16, with the results of its layers."""
    folder = tmp_path_factory.mktemp("kit")
    options = {"dtype": "fp16", "capacity": 128, "top_k": 4, "max_rows": 16, "prefill_chunk": 16}
    export_bundle(tiny_model, tiny_heads, folder / "bundle", **options)  # type: ignore[arg-type]
    made = ["debug", str(folder / "bundle"), "--target", "sm_89", "-o", str(folder / "kit"), "--layers"]
    assert main(made) == 0
    return folder / "kit"


def polygraphy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run polygraphy's program, as commands.sh does."""
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def with_fault(kit: Path, folder: Path) -> Path:
    """A copy of the kit whose model multiplies an MLP product of one layer by 1.5."""
    copy = Path(shutil.copytree(kit, folder / "faulty"))
    marked = json.loads((kit / "kit.json").read_text("utf-8"))["marked"]
    entry = [each for each in marked if each["place"] == f"layer {FAULTY_LAYER}, MLP product"][-1]
    model = onnx.load(copy / "model" / "step.onnx")
    [node] = [each for each in model.graph.node if each.name == entry["node"]]
    node.output[0] = f"{entry['tensor']}/right"
    factor = onnx.numpy_helper.from_array(np.array(1.5, np.float16), "fault/factor")
    model.graph.initializer.append(factor)
    at = list(model.graph.node).index(node) + 1
    model.graph.node.insert(at, onnx.helper.make_node("Mul", [node.output[0], "fault/factor"], [entry["tensor"]], "fault"))
    onnx.save(model, copy / "model" / "step.onnx")
    return copy


def save(kit: Path, step: str) -> dict[str, Any]:
    """Let polygraphy run a step and save all results that the kit expects."""
    expected = read_results(kit / "expected" / f"{step}.json")["expected"]
    found = polygraphy(
        kit, "run", "model/step.onnx", "--onnxrt", "--onnx-outputs", *expected, "--load-inputs", f"inputs/{step}.json",
        "--save-outputs", f"saved/{step}.json",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return compare_kit(kit)


def test_a_kit_holds_real_steps_and_polygraphy_passes_them(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((kit / "kit.json").read_text("utf-8"))["steps"] == ["prefill", "plain", "tree"]
    environment = {**os.environ, "RUNNER": "--onnxrt", "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    program = kit.parent / "bin" / "polygraphy"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom polygraphy.tools import main\nsys.exit(main())\n", "utf-8")
    program.chmod(0o755)
    environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"
    copy = Path(shutil.copytree(kit, kit.parent / "whole"))
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 900}
    found = subprocess.run(["./commands.sh"], cwd=copy, env=environment, check=False, **options)
    assert found.stdout.count("[I] PASSED | Runtime") == 3, found.stdout[-2000:] + found.stderr[-2000:]
    assert main(["debug", "--compare", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert all(step in shown for step in ("prefill", "plain", "tree")) and "[I]" not in shown


def test_the_layer_with_the_fault_leaves_first(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = with_fault(kit, tmp_path)
    [found] = save(faulty, "tree")["steps"]["tree"].values()
    assert found["first"]["place"] == f"layer {FAULTY_LAYER}, MLP product"
    assert main(["debug", "--compare", str(faulty)]) == 1
    assert f"layer {FAULTY_LAYER}, MLP product" in capsys.readouterr().out


def test_what_is_no_kit_is_refused_by_name(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kit.json"):
        compare_kit(tmp_path)
    empty = Path(shutil.copytree(kit, tmp_path / "empty"))
    with pytest.raises(UsageError, match="holds no outputs"):
        compare_kit(empty)
    (empty / "saved" / "tree.json").write_text("{}", "utf-8")
    with pytest.raises(UsageError, match="no results of polygraphy"):
        compare_kit(empty)
    expected = dict(read_results(kit / "expected" / "tree.json")["expected"])
    spoiled = np.full_like(expected["logits"], np.nan)
    write_results(empty / "saved" / "tree.json", "trt", {**expected, "logits": spoiled, "hidden": expected["hidden"][:, :0]})
    [found] = compare_kit(empty)["steps"]["tree"].values()
    assert found["leaving"] == 2 and {each["tensor"] for each in found["worst"][:1]} == {"hidden"}
    raw = json.loads((empty / "kit.json").read_text("utf-8"))
    (empty / "kit.json").write_text(json.dumps({**raw, "kit_version": 99}), "utf-8")
    with pytest.raises(UsageError, match="version 99"):
        compare_kit(empty)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["BUNDLE"],
        ["BUNDLE", "--compare", "KIT"],
        ["BUNDLE", "--target", "sm_86", "-o", "K", "--precision", "fp8"],
    ],
)
def test_arguments_that_say_too_little_or_too_much_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", *arguments]) == 1
    assert capsys.readouterr().err.count("hint:") == 1
