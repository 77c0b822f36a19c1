"""Linked weights: a checkpoint that can't be linked is refused by name, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medusa_deploy.export.backbone.checkpoint import find_stored
from medusa_deploy.export.backbone.linked import stored_parameters
from medusa_deploy.export.estimate import plan_export
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def _rewrite_index(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def _shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _patched(folder: Path, old: bytes, new: bytes) -> None:
    data = _shard(folder).read_bytes()
    assert len(old) == len(new)
    assert old in data
    _shard(folder).write_bytes(data.replace(old, new, 1))


def _truncate(folder: Path) -> None:
    _shard(folder).write_bytes(_shard(folder).read_bytes()[:-1])


def _dangle(folder: Path) -> None:
    _shard(folder).unlink()
    (folder / "model-00001-of-00002.safetensors").symlink_to("nowhere")


def _grow(folder: Path) -> None:
    with _shard(folder).open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


def _not_finite(folder: Path) -> None:
    tensors = {name: array.copy() for name, array in load_file(_shard(folder)).items()}
    next(iter(tensors.values())).reshape(-1)[0] = np.nan
    save_file(tensors, _shard(folder))


BAD = {
    "truncated shard": (_truncate, "bytes; its tensors end at|can't lie at bytes"),
    "missing shard": (lambda folder: _shard(folder).unlink(), "can't be read: No such file"),
    "link to nowhere": (_dangle, "can't be read: No such file"),
    "shard outside the folder": (
        lambda folder: _rewrite_index(folder, "model.norm.weight", "../other.safetensors"),
        "isn't a file of its",
    ),
    "index that names the wrong shard": (
        lambda folder: _rewrite_index(folder, "model.embed_tokens.weight", "model-00002-of-00002.safetensors"),
        "says that .* holds model.embed_tokens.weight",
    ),
    "tensor missing": (lambda folder: _patched(folder, b"model.embed_tokens", b"model.embed_tokenz"), "holds model.embed_tokens"),
    "unknown type": (lambda folder: _patched(folder, b'"F32"', b'"F99"'), "a type that isn't known"),
    "type that doesn't fit the bytes": (lambda folder: _patched(folder, b'"F32"', b'"F16"'), "can't lie at bytes"),
    "header longer than the file": (_grow, "says that its header has"),
    "values that aren't finite": (_not_finite, "holds NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused_by_name(kind: str, broken: Path, tmp_path: Path) -> None:
    damage, message = BAD[kind]
    damage(broken)
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle(broken, None, tmp_path / "bundle", weights="linked", capacity=64)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left behind"


def test_a_tied_weight_that_is_stored_twice_must_be_the_same(broken: Path) -> None:
    path = _shard(broken)
    tensors = load_file(path)
    embedding = find_stored(broken)["model.embed_tokens.weight"].mapped()
    save_file({**tensors, "lm_head.weight": embedding}, path)
    _rewrite_index(broken, "lm_head.weight", path.name)
    stored_parameters(broken, "fp32", 64)
    save_file({**tensors, "lm_head.weight": embedding + 1}, path)
    with pytest.raises(CheckpointError, match="other numbers"):
        stored_parameters(broken, "fp32", 64)


def test_a_dry_run_refuses_what_the_export_would(broken: Path) -> None:
    _truncate(broken)
    with pytest.raises(CheckpointError):
        plan_export(broken, None, weights="linked")
