from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from medusa_deploy.export import weights
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import (
    BundleExistsError,
    CheckpointError,
    DeployError,
    ExportMismatchError,
    HeadsError,
    HeadsMismatchError,
    OutputError,
    TreeError,
    UsageError,
)
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.heads import HeadSet
from medusa_deploy.runtime.files.heads_file import TENSORS_NAME, write_heads
from medusa_deploy.runtime.tree import Tree, chain
from support.tiny import HIDDEN, VOCAB, tiny_head_set

SMALL: dict[str, Any] = {"capacity": 64, "top_k": 4, "max_rows": 8, "prefill_chunk": 16}


def check_refused(error: type[DeployError], message: str, model: Path, heads: Path | None, output: Path, **options: Any) -> None:
    """The export raises ``error`` with a hint and leaves nothing beside what was there."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        export_bundle(model, heads, output, **{**SMALL, **options})
    assert caught.value.hint
    assert sorted(output.parent.iterdir()) == before


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_weight(folder: Path, name: str, value: float | None) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if value is not None:
        tensor.flatten()[7] = value
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- backbones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_arent_finite(own_model: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weight(own_model, name, value)
    check_refused(CheckpointError, f"{name} holds NaN or infinite", own_model, None, tmp_path / "bundle")


def test_weights_that_overflow_in_fp16(own_model: Path, tmp_path: Path) -> None:
    change_weight(own_model, "model.norm.weight", 1e6)
    check_refused(
        CheckpointError, r"model\.norm\.weight holds NaN or infinite", own_model, None, tmp_path / "bundle", dtype="fp16"
    )


def test_a_missing_weight_isnt_made_up(own_model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weight(own_model, name, None)
    check_refused(CheckpointError, f"lacks 1 tensors of LlamaForCausalLM, such as {name}", own_model, None, tmp_path / "bundle")


def test_no_such_model(tmp_path: Path) -> None:
    check_refused(CheckpointError, "no such model", tmp_path / "nowhere", None, tmp_path / "bundle")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file(own_model: Path, tmp_path: Path, missing: str) -> None:
    (own_model / missing).unlink()
    check_refused(CheckpointError, "can't load", own_model, None, tmp_path / "bundle")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_truncated_file(own_model: Path, tmp_path: Path, name: str) -> None:
    content = (own_model / name).read_bytes()
    (own_model / name).write_bytes(content[: len(content) // 2])
    check_refused(CheckpointError, "can't (?:load|be read)", own_model, None, tmp_path / "bundle")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    check_refused(CheckpointError, "unknown kind", tmp_path / "model.txt", None, tmp_path / "bundle")


# -- heads and trees -----------------------------------------------------------------------------------------------


def make_heads(folder: Path, **fields: Any) -> Path:
    """Random heads over their own projections, of the sizes in ``fields`` (default: the tiny model's)."""
    config = replace(tiny_head_set().config, projection="own", **fields)
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for head in range(config.num_heads):
        shape = (config.hidden_size, config.hidden_size)
        tensors[f"head.{head}.layer.0.weight"] = rng.normal(size=shape).astype(np.float32)
        tensors[f"head.{head}.layer.0.bias"] = np.zeros(config.hidden_size, np.float32)
        tensors[f"head.{head}.projection.weight"] = rng.normal(size=(config.draft_vocab_size, config.hidden_size)).astype(
            np.float32
        )
    write_heads(HeadSet(config, tensors), folder)
    return folder


def test_heads_that_arent_finite(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    heads = make_heads(tmp_path / "heads")
    tensors = load_file(heads / TENSORS_NAME)
    tensors["head.2.layer.0.weight"][3, 3] = np.nan
    save_file(tensors, heads / TENSORS_NAME)
    check_refused(HeadsError, r"head\.2\.layer\.0\.weight holds NaN", tiny_model, heads, tmp_path / "bundle")


def test_heads_of_another_hidden_size(tiny_model: Path, tmp_path: Path) -> None:
    heads = make_heads(tmp_path / "heads", hidden_size=32)
    check_refused(HeadsMismatchError, f"hidden size 32, the backbone {HIDDEN}", tiny_model, heads, tmp_path / "bundle")


def test_heads_of_another_vocabulary(tiny_model: Path, tmp_path: Path) -> None:
    heads = make_heads(tmp_path / "heads", draft_vocab_size=100)
    check_refused(
        HeadsMismatchError, f"100 tokens, the backbone's vocabulary has {VOCAB}", tiny_model, heads, tmp_path / "bundle"
    )


def test_more_candidates_than_tokens(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    check_refused(HeadsMismatchError, "top-k is 129", tiny_model, tiny_heads, tmp_path / "bundle", top_k=VOCAB + 1)


def test_a_tree_deeper_than_the_heads(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    message = "the tree is 4 deep, and there are 3 heads"
    check_refused(TreeError, message, tiny_model, tiny_heads, tmp_path / "bundle", tree=chain(4))


def test_a_rank_that_heads_dont_give(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    wide = Tree.from_choices([(0,), (4,)])
    check_refused(TreeError, "uses rank 4, and a head returns 4", tiny_model, tiny_heads, tmp_path / "bundle", tree=wide)


def test_a_tree_that_came_with_heads_and_doesnt_fit_top_k(tiny_model: Path, tmp_path: Path) -> None:
    write_heads(tiny_head_set(), tmp_path / "heads", {"tree": [[0], [1], [5]]})
    check_refused(TreeError, "uses rank 5", tiny_model, tmp_path / "heads", tmp_path / "bundle")


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"capacity": 0}, {"batch": 0}, {"top_k": 0}])
def test_options_out_of_range(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        export_bundle(tiny_model, None, tmp_path / "bundle", **{**SMALL, **options})
    assert list(tmp_path.iterdir()) == []


# -- outputs -------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "mine").write_text("precious")
    check_refused(BundleExistsError, "exists", tiny_model, None, output)
    assert (output / "mine").read_text() == "precious"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """Trace each step graph once for all tests of this file: they are about what happens afterwards."""
    from medusa_deploy.export import graphs

    for name in ("trace_step", "trace_heads"):
        original = getattr(graphs, name)

        def cached(backbone: Any, stack: Any, *rest: Any, name: str = name, original: Any = original) -> Any:
            key = (name, *rest)
            if key not in _TRACES:
                _TRACES[key] = original(backbone, stack, *rest)
            return _TRACES[key].clone()

        monkeypatch.setattr(graphs, name, cached)


_TRACES: dict[Any, Any] = {}


@pytest.mark.usefixtures("traces")
def test_a_full_disk_leaves_nothing(
    tiny_model: Path,
    tiny_heads: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "bundle"
    store, stored = weights.WeightsFile._store, []

    def full(self: weights.WeightsFile, tensor: Any) -> int:
        stored.append(tensor)
        if len(stored) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return store(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(weights.WeightsFile, "_store", full)
        check_refused(OutputError, "No space left on device", tiny_model, tiny_heads, output)
        output.mkdir()
        (output / "mine").write_text("precious")
        stored.clear()
        check_refused(OutputError, "No space left on device", tiny_model, tiny_heads, output, force=True)
        assert (output / "mine").read_text() == "precious"
    capfd.readouterr()
    export_bundle(tiny_model, tiny_heads, output, **SMALL, force=True)
    assert capfd.readouterr() == ("", ""), "export reports through its callback only"
    assert open_bundle(output).manifest.heads.num_heads == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.usefixtures("traces")
def test_a_graph_that_computes_something_else_is_not_committed(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = weights.WeightsFile._store

    def wrong(self: weights.WeightsFile, tensor: Any) -> int:
        array = tensor.numpy()
        return store(self, ir.tensor(array * np.float32(1.01)) if array.dtype == np.float32 else tensor)

    monkeypatch.setattr(weights.WeightsFile, "_store", wrong)
    check_refused(ExportMismatchError, "differ by", tiny_model, tiny_heads, tmp_path / "bundle")


@pytest.mark.usefixtures("traces")
def test_a_killed_export_leaves_no_output_and_the_next_one_clears_up(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    code = (
        "import sys; from medusa_deploy.export.exporter import export_bundle; export_bundle(*sys.argv[1:], capacity=64, top_k=4)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-c", code, tiny_model, tiny_heads, output], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        deadline = time.monotonic() + 300
        while not any(tmp_path.glob(".bundle.partial-*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    leftovers = [path.name for path in tmp_path.iterdir()]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".bundle.partial-")
    export_bundle(tiny_model, tiny_heads, output, **SMALL)
    assert open_bundle(output).manifest.heads.num_heads == 3
    assert list(tmp_path.iterdir()) == [output]
