"""Packed weights: one file in a cache that is whole or not there, keeps to its bytes, and is never taken from who uses it."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

import onnxruntime

from medusa_deploy.runtime import Request, load
from medusa_deploy.runtime.session import Session


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_all_graphs_read_one_file_of_packed_weights(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    load(tiny_bundle, slots=2, threads=1)
    entry = entry_of(tmp_path / "cache")
    assert sorted(file.name for file in entry.iterdir()) == ["1.bin", "1.onnx", "2.onnx", "made_from.json"]
    made = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    load(tiny_bundle, slots=2, threads=1)
    assert {file.name: file.stat().st_mtime_ns for file in entry.iterdir()} == made, "nothing is made twice"
    session = load(tiny_bundle, slots=4, threads=1)
    assert sorted(file.name for file in entry.iterdir()) == ["1.bin", "1.onnx", "2.onnx", "4.onnx", "made_from.json"]
    asked = [Request(token_ids=[token], max_new_tokens=5) for token in range(4)]
    assert all(len(generation.token_ids) == 5 for _, generation in session.generate_many(asked))


@pytest.mark.parametrize("name", ["1.bin", "1.onnx", "2.onnx"])
def test_what_was_cut_short_is_made_anew(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Session, name: str
) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    load(tiny_bundle, slots=2, threads=1)
    file = entry_of(tmp_path / "cache") / name
    whole = file.read_bytes()
    file.unlink()  # a running session may have mapped it
    file.write_bytes(whole[: len(whole) // 2])
    session = load(tiny_bundle, slots=2, threads=1)
    assert len(file.read_bytes()) == len(whole)
    asked = [Request(token_ids=[token, 5], max_new_tokens=6, rows=4) for token in range(2)]
    for index, generation in session.generate_many(asked):
        assert generation.token_ids == alone.submit(asked[index]).result().token_ids


def test_a_disk_without_room_is_not_filled(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match=r"5 MiB may be needed, and 0 MiB are free on the file system /"):
        load(tiny_bundle, slots=2, threads=1)
    assert not list((tmp_path / "cache").iterdir())


def test_one_slot_writes_no_cache(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    load(tiny_bundle, threads=1)
    assert not (tmp_path / "cache").exists()


def test_without_a_cache_slots_run_one_after_another(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(blocked / "cache"))
    with pytest.warns(RuntimeWarning, match="MEDUSA_DEPLOY_CACHE"):
        session = load(tiny_bundle, slots=3, threads=1)
    asked = [Request(token_ids=[token], max_new_tokens=5) for token in range(3)]
    assert all(len(generation.token_ids) == 5 for _, generation in session.generate_many(asked))
    assert set(calls) == {1}


def test_a_disk_that_gets_full_leaves_nothing_and_slots_run_one_after_another(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Session, calls: list[int]
) -> None:
    """A limit of a file's size stands for the disk: to the one who writes both are the same failure."""
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (20 << 10, 150 << 10, 400 << 10):  # within the weights, then within their packed forms
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.warns(RuntimeWarning, match=r"5 MiB may be needed, and \d+ MiB are free .* says: "):
                session = load(tiny_bundle, slots=2, threads=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list((tmp_path / "cache").iterdir())
    asked = [Request(token_ids=[token, 5], max_new_tokens=6, rows=4) for token in range(2)]
    for index, generation in session.generate_many(asked):
        assert generation.token_ids == alone.submit(asked[index]).result().token_ids
    assert set(calls) == {1}


@pytest.fixture
def another_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle as if it had been exported from other weights: it has an entry of its own in the cache."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "another"))
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["files"]["onnx/weights.bin"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


def age(entry: Path, days: float) -> None:
    used = time.time() - days * 24 * 3600
    os.utime(entry, (used, used))


@pytest.mark.parametrize("change", ["nothing", "bundle gone", "bundle changed", "another version", "no record"])
def test_entries_that_can_be_of_no_use_go_a_day_after_their_last_use(
    bundle_copy: Path, another_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    load(bundle_copy, slots=2, threads=1)
    entry = entry_of(tmp_path / "cache")
    if change == "bundle gone":
        shutil.rmtree(bundle_copy)
    elif change == "bundle changed":
        (bundle_copy / "onnx" / "step.more.onnx").write_bytes(b"")
    elif change == "another version":
        monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    elif change == "no record":
        (entry / "made_from.json").unlink()
    age(entry, 0.9)
    load(another_bundle, slots=2, threads=1, check_hashes=False)
    assert entry.exists()
    age(entry, 1.1)
    load(another_bundle, slots=2, threads=1, check_hashes=False)
    assert entry.exists() == (change == "nothing")
    age(entry, 15) if entry.exists() else None
    load(another_bundle, slots=2, threads=1, check_hashes=False)
    assert not entry.exists()


def test_beyond_its_bytes_the_cache_keeps_what_is_in_use_and_works_on(
    bundle_copy: Path, another_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Session
) -> None:
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDUSA_DEPLOY_CACHE_BYTES", "1")
    session = load(bundle_copy, slots=2, threads=1)
    entry = entry_of(tmp_path / "cache")
    another = load(another_bundle, slots=2, threads=1, check_hashes=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "both are in use"
    shutil.rmtree(tmp_path / "cache")  # as another program may; what is mapped stays
    asked = [Request(token_ids=[token, 5], max_new_tokens=6, rows=4) for token in range(2)]
    for index, generation in [*session.generate_many(asked), *another.generate_many(asked)]:
        assert generation.token_ids == alone.submit(asked[index]).result().token_ids
    load(bundle_copy, slots=2, threads=1)
    assert entry_of(tmp_path / "cache") == entry
    del session, another
    gc.collect()
    load(another_bundle, slots=2, threads=1, check_hashes=False)
    assert entry_of(tmp_path / "cache") != entry, "nobody used it any more"
