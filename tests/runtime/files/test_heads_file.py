from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.heads.layouts import read_heads
from medusa_deploy.runtime.errors import BundleExistsError, HeadsError, OutputError, TreeError
from medusa_deploy.runtime.files import heads_file
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet
from medusa_deploy.runtime.files.heads_file import (
    CONFIG_NAME,
    FORMAT_VERSION,
    MAX_CONFIG_BYTES,
    TENSORS_NAME,
    named_trees,
    platt_scaling,
    read_heads_config,
    read_heads_folder,
    write_heads,
)

HIDDEN = 8
DRAFT = 6


def make_heads(kind: str = "medusa", projection: str = "pruned", layers: int = 1) -> HeadSet:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for head in range(2):
        for layer in range(layers):
            width = 2 * HIDDEN if kind == "grounded" and layer == 0 else HIDDEN
            tensors[f"head.{head}.layer.{layer}.weight"] = rng.normal(size=(HIDDEN, width)).astype(np.float16)
            tensors[f"head.{head}.layer.{layer}.bias"] = rng.normal(size=HIDDEN).astype(np.float32)
        if projection == "own":
            tensors[f"head.{head}.projection.weight"] = rng.normal(size=(DRAFT, HIDDEN)).astype(np.float32)
    if projection == "pruned":
        tensors["token_map"] = np.array([1, 3, 4, 9, 11, 20])
    return HeadSet(HeadConfig(kind, 2, layers, HIDDEN, DRAFT, projection), tensors)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_heads(make_heads(), tmp_path / "heads")
    return tmp_path / "heads"


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = {**load_file(folder / TENSORS_NAME), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / TENSORS_NAME)


@pytest.mark.parametrize("projection", ["own", "shared", "pruned"])
@pytest.mark.parametrize(("kind", "layers"), [("medusa", 2), ("grounded", 1)])
def test_what_is_written_is_read(tmp_path: Path, kind: str, projection: str, layers: int) -> None:
    heads = make_heads(kind, projection, layers)
    write_heads(heads, tmp_path / "heads")
    read = read_heads_folder(tmp_path / "heads")
    assert read.config == heads.config
    assert read.tensors.keys() == heads.tensors.keys()
    for name, tensor in heads.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read.tensors[name], tensor)


def test_a_pruned_projection_of_its_own_serves_all_heads(tmp_path: Path) -> None:
    heads = make_heads()
    weight = np.ones((DRAFT, HIDDEN), np.float32)
    write_heads(HeadSet(heads.config, {**heads.tensors, "projection.weight": weight}), tmp_path / "heads")
    np.testing.assert_array_equal(read_heads_folder(tmp_path / "heads").tensors["projection.weight"], weight)


def test_extra_facts_stand_in_the_config(tmp_path: Path) -> None:
    write_heads(make_heads(), tmp_path / "heads", {"hit_rates": [[0.5, 0.1], [0.3, 0.1]], "tree": [[0], [0, 0]]})
    config = read_heads_config(tmp_path / "heads")
    assert config["hit_rates"] == [[0.5, 0.1], [0.3, 0.1]]
    assert config["num_heads"] == 2
    assert named_trees(config, 2) == {"default": [[0], [0, 0]]}


def test_extra_facts_cant_contradict_the_format(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="num_heads"):
        write_heads(make_heads(), tmp_path / "heads", {"num_heads": 3})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(folder: Path) -> None:
    before = (folder / TENSORS_NAME).read_bytes()
    with pytest.raises(BundleExistsError):
        write_heads(make_heads(projection="own"), folder)
    assert (folder / TENSORS_NAME).read_bytes() == before
    write_heads(make_heads(projection="own"), folder, force=True)
    assert read_heads_folder(folder).config.projection == "own"


def test_a_full_disk_leaves_the_old_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        write_heads(make_heads(projection="own"), folder, force=True)
    assert read_heads_folder(folder).config.projection == "pruned"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[]", "a JSON list"),
        (b"{}", "format None"),
        (b'{"format": "medusa"}', "format 'medusa'"),
        (b'{"format": "medusa-deploy-heads"}', "format_version None"),
        (b'{"format": "medusa-deploy-heads", "format_version": true}', "format_version True"),
        (b" " * (MAX_CONFIG_BYTES + 1), "over the limit"),
    ],
)
def test_a_broken_config_is_refused(folder: Path, config: bytes, message: str) -> None:
    (folder / CONFIG_NAME).write_bytes(config)
    with pytest.raises(HeadsError, match=message) as caught:
        read_heads_folder(folder)
    assert caught.value.hint


def test_a_newer_format_is_refused(folder: Path) -> None:
    rewrite_config(folder, format_version=FORMAT_VERSION + 1)
    with pytest.raises(HeadsError, match="format version 3; this program reads up to 2"):
        read_heads_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "head.2.layer.0.weight"),
        ({"num_heads": 1}, "head.1.layer.0"),
        ({"num_heads": 0}, "positive integers"),
        ({"num_layers": "1"}, "positive integers"),
        ({"hidden_size": 4}, "has shape"),
        ({"kind": "grounded"}, r"has shape \(8, 8\), expected \(8, 16\)"),
        ({"kind": "hydra"}, "unknown head kind"),
        ({"projection": "own"}, "projection.weight"),
        ({"projection": "shared"}, "token_map stands beside a shared projection"),
        ({"draft_vocab_size": 5}, "token_map has shape"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(HeadsError, match=message):
        read_heads_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__0__layer__0__weight": np.full((HIDDEN, HIDDEN), np.nan, np.float32)}, "NaN"),
        ({"head__0__layer__0__bias": np.full(HIDDEN, np.inf, np.float16)}, "infinite"),
        ({"head__0__layer__0__bias": None}, "lack the tensor head.0.layer.0.bias"),
        ({"head__0__layer__0__bias": np.ones(HIDDEN, np.int64)}, "dtype int64"),
        ({"head__0__layer__0__bias": np.ones(HIDDEN, np.uint8)}, "as U8"),
        ({"projection__weight": np.zeros((DRAFT, HIDDEN), np.float16)}, "all zero"),
        ({"projection__weight": np.ones((DRAFT, HIDDEN + 1), np.float16)}, "has shape"),
        ({"token_map": np.array([1, 3, 4, 9, 11, -1])}, "token id -1"),
        ({"token_map": np.array([1, 3, 4, 9, 11, 11])}, "twice"),
        ({"token_map": np.array([1, 3, 4, 9, 11, 20], np.int32)}, "int32"),
        ({"token_map": np.array([1, 3, 4, 9, 11, 20], np.float32)}, "dtype float32"),
        ({"surprise": np.ones(3, np.float32)}, "surprise"),
    ],
)
def test_bad_tensors_are_refused(folder: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    rewrite_tensors(folder, **changes)
    with pytest.raises(HeadsError, match=message):
        read_heads_folder(folder)


def test_heads_that_arent_finite_are_not_written(tmp_path: Path) -> None:
    heads = make_heads()
    bad = HeadSet(heads.config, {**heads.tensors, "head.0.layer.0.bias": np.full(HIDDEN, np.nan, np.float32)})
    with pytest.raises(HeadsError, match="NaN"):
        write_heads(bad, tmp_path / "heads")
    wrong = HeadSet(replace(heads.config, num_heads=3), heads.tensors)
    with pytest.raises(HeadsError, match="head.2"):
        write_heads(wrong, tmp_path / "heads")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_tensors_are_refused(folder: Path, size: int) -> None:
    data = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(data[:size])
    with pytest.raises(HeadsError, match="can't be read") as caught:
        read_heads_folder(folder)
    assert "truncated" in caught.value.hint


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Heads whose every tensor is larger than a file should be."""
    monkeypatch.setattr(heads_file, "FILE_BYTES", 1)
    heads = make_heads()
    write_heads(heads, tmp_path / "parts")
    found = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(found) == len(heads.tensors)
    return found


def test_large_heads_lie_in_several_files(parts: list[Path]) -> None:
    assert read_heads_folder(parts[0].parent).digest() == make_heads().digest()
    assert read_heads(parts[0].parent).heads.digest() == read_heads(parts[1]).heads.digest() == make_heads().digest()


def test_a_missing_part_and_one_too_many_are_named(parts: list[Path]) -> None:
    first, second = parts[0].read_bytes(), parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(HeadsError, match=rf"{parts[1].name} is missing"):
        read_heads_folder(parts[0].parent)
    parts[1].write_bytes(first)
    with pytest.raises(HeadsError, match=f"{parts[1].name} holds .*, and a file before it does"):
        read_heads_folder(parts[0].parent)
    parts[1].write_bytes(second)
    other = parts[0].with_name("heads-00001-of-00002.safetensors")
    other.write_bytes(first)
    with pytest.raises(HeadsError, match=r"is missing|files of heads"):
        read_heads_folder(parts[0].parent)
    other.unlink()
    parts[0].with_name(TENSORS_NAME).write_bytes(first)
    with pytest.raises(HeadsError, match=f"holds {TENSORS_NAME} and {parts[0].name}"):
        read_heads_folder(parts[0].parent)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(HeadsError, match=r"heads\.safetensors is missing"):
        read_heads_folder(folder)
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(HeadsError, match=r"config\.json can't be read: No such file"):
        read_heads_folder(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tree": [[0], [0, 0], [0, 0, 0]]}, TreeError, "3 deep, and there are 2 heads"),
        ({"tree": [[0, 0]]}, TreeError, "no parent"),
        ({"tree": "chain"}, HeadsError, "is a str"),
        ({"tree": [[0.5]]}, TreeError, "something other than ranks"),
        ({"trees": [[0]]}, HeadsError, "trees is a list"),
        ({"trees": {"wide": None}}, HeadsError, "'wide' is a NoneType"),
    ],
)
def test_bad_trees_are_refused(tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        named_trees(fields, 2)
    with pytest.raises(error, match=message):
        write_heads(make_heads(), tmp_path / "heads", fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0.7, -1.0]], "1 pairs for 2 heads"),
        ({"0": [0.7, -1.0]}, "platt_scaling holds"),
        ([[0.7], [0.7, -1.0]], "platt_scaling holds"),
        ([[0.7, float("nan")], [0.7, -1.0]], "platt_scaling holds"),
        ([[-0.7, 0.0], [0.7, -1.0]], "platt_scaling holds"),
    ],
)
def test_a_bad_scaling_is_refused(tmp_path: Path, pairs: Any, message: str) -> None:
    with pytest.raises(HeadsError, match=message):
        write_heads(make_heads(), tmp_path / "heads", {"platt_scaling": pairs})
    assert list(tmp_path.iterdir()) == []
    assert platt_scaling({"platt_scaling": [[0.7, -1.0]]}, 1) == ((0.7, -1.0),)


def test_named_trees_are_kept_and_tree_is_the_default() -> None:
    fields = {"tree": [[0]], "trees": {"wide": [[0], [1]], "default": [[0], [1], [2]]}}
    assert named_trees(fields, 1) == {"wide": [[0], [1]], "default": [[0]]}
