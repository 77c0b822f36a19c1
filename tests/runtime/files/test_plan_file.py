"""Compressed plans come back whole. Anything but the record's plan is refused before it takes memory."""

from __future__ import annotations

import json
import lzma
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.engines.plan_packing import pack_plan
from medusa_deploy.runtime import Session
from medusa_deploy.runtime.errors import BundleIntegrityError, BundleSchemaError, MissingDependencyError
from medusa_deploy.runtime.files import plan_file
from medusa_deploy.runtime.files.bundle import open_bundle, record_files, write_manifest
from medusa_deploy.runtime.files.engine_record import RECORD_VERSION, parse_engine_record
from medusa_deploy.runtime.files.plan_file import XZ, Compression, parse_compression, plan_bytes
from medusa_deploy.runtime.tree import chain
from support.fake_cuda import FakeRuntime
from support.fake_engine import TARGET, add_fake_engine, load_fake
from support.fake_trt import FakeTrt

PLAN = b"__global__ void kernel() {}\n" * 200_000  # 5.6 MB


def _stored(plan: bytes = PLAN, check: int = lzma.CHECK_NONE, preset: int = 1) -> tuple[bytes, Compression]:
    data = lzma.compress(plan, check=check, preset=preset)
    return data, Compression(XZ, len(data), len(plan))


@pytest.mark.parametrize("size", [1, plan_file._CHUNK - 1, plan_file._CHUNK, plan_file._CHUNK + 1, 3 * plan_file._CHUNK])
@pytest.mark.parametrize("random", [False, True])
def test_a_plan_comes_back_as_it_was(size: int, random: bool, tmp_path: Path) -> None:
    plan = np.random.default_rng(0).bytes(size) if random else PLAN[:size]
    path = tmp_path / "step.plan"
    path.write_bytes(plan)
    kept, how = pack_plan(path)
    assert [kept] == list(tmp_path.iterdir())
    assert (how is None) == (random or size == 1), "what doesn't get smaller stays as it was"
    stored = kept.read_bytes()
    assert how is None or (how.stored_bytes, how.plan_bytes) == (len(stored), size)
    assert bytes(plan_bytes(kept.name, stored, how)) == plan


def test_equal_plans_give_equal_files(tmp_path: Path) -> None:
    packed = []
    for name in "ab":
        (tmp_path / name).write_bytes(PLAN)
        packed.append(pack_plan(tmp_path / name)[0].read_bytes())
    assert packed[0] == packed[1]


def test_there_is_no_second_copy_of_a_plan_in_memory() -> None:
    stored, how = _stored()
    tracemalloc.start()
    try:
        plan = plan_bytes("p", stored, how)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(plan) == len(PLAN)
    assert peak < 1.6 * len(PLAN)


def _bomb() -> tuple[bytes, Compression]:
    data = lzma.compress(bytes(256 << 20), preset=1)
    return data, Compression(XZ, len(data), 1 << 20)


_BAD = {
    "a bomb": (_bomb, "holds more than the 1048576 bytes"),
    "a byte too many": (lambda: (_stored()[0], replace(_stored()[1], plan_bytes=len(PLAN) - 1)), "holds more than"),
    "a byte too few": (lambda: (_stored()[0], replace(_stored()[1], plan_bytes=len(PLAN) + 1)), "holds a plan of 5600000 bytes"),
    "a size that was made up": (lambda: (_stored()[0], replace(_stored()[1], plan_bytes=1 << 60)), "holds a plan of 5600000"),
    "cut off": (lambda: _resized(lambda data: data[:-40]), "ends after"),
    "something behind it": (lambda: _resized(lambda data: data + b"\0" * 8), "and 8 bytes behind it"),
    "another plan behind it": (lambda: _resized(lambda data: data * 2), "bytes behind it"),
    "damaged": (lambda: _resized(lambda data: data[:30] + bytes([data[30] ^ 255]) + data[31:]), "can't be decompressed|holds"),
    "no stream at all": (lambda: _resized(lambda _: b"not a plan" * 10), "can't be decompressed"),
    "another file size": (lambda: (_stored()[0] + b"\0", _stored()[1]), "bytes, the engine's record says"),
    "a window over the limit": (lambda: _stored(preset=9), "can't be decompressed"),
}


def _resized(change: Any) -> tuple[bytes, Compression]:
    data, how = _stored()
    data = change(data)
    return data, replace(how, stored_bytes=len(data))


@pytest.mark.parametrize("case", _BAD)
def test_what_is_not_the_plan_of_the_record_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = _BAD[case]
    stored, how = make()
    if "window" in case:
        monkeypatch.setattr(plan_file, "MEMORY_LIMIT", 32 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(BundleIntegrityError, match=said) as caught:
            plan_bytes("step.plan.xz", stored, how)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.hint and "step.plan.xz" in caught.value.message
    assert peak < 2 * len(PLAN), "no memory for what isn't wanted"


def test_a_python_without_lzma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lzma", None)
    with pytest.raises(MissingDependencyError, match="can't read it"):
        plan_bytes("p", *_stored())


@pytest.mark.parametrize(
    "field", [{"method": "zip"}, {"plan_bytes": 0}, {"stored_bytes": "9"}, {"plan_bytes": True}, {"more": 1}]
)
def test_a_record_with_another_compression_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_compression({"p": {**asdict(Compression(XZ, 1, 2)), **field}})


# -- a bundle with compressed plans on the fake GPU ----------------------------------------------------------------


def _place(folder: Path) -> Path:
    return folder / "engines" / TARGET


def _recorded(folder: Path, **fields: Any) -> None:
    """Makes the manifest record the files as they are, and a record with ``fields``."""
    place = _place(folder)
    record = json.loads((place / "engine.json").read_text())
    (place / "engine.json").write_text(json.dumps({**record, **fields}))
    from medusa_deploy.runtime.files.manifest import parse_manifest

    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    files = {**manifest.files, **{f"engines/{TARGET}/{name}": entry for name, entry in record_files(place).items()}}
    write_manifest(folder, replace(manifest, files=files))


def test_an_engine_with_compressed_plans_decodes_as_the_bundle_does(
    bundle_copy: Path, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_fake_engine(bundle_copy, packed=True)
    record = parse_engine_record((_place(bundle_copy) / "engine.json").read_bytes())
    assert record.plan == "step.plan.xz" and set(record.compression) == {record.plan}
    assert sorted(path.name for path in _place(bundle_copy).iterdir()) == ["engine.json", "heads.plan", "step.plan.xz"]
    session = load_fake(bundle_copy, monkeypatch)
    greedy: dict[str, Any] = {"token_ids": [1, 2, 3], "max_new_tokens": 30, "tree": chain(3)}
    assert session.generate(**greedy).token_ids == tiny_session.generate(**greedy).token_ids


@pytest.mark.parametrize("behind_the_manifest", [True, False], ids=["tampered", "recorded by the manifest"])
def test_nothing_is_decompressed_that_the_manifest_does_not_stand_behind(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, behind_the_manifest: bool
) -> None:
    add_fake_engine(bundle_copy, packed=True)
    path = _place(bundle_copy) / "step.plan.xz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    if not behind_the_manifest:
        _recorded(bundle_copy)
    else:
        monkeypatch.setattr(lzma, "LZMADecompressor", None)
    module = FakeTrt(FakeRuntime())
    with pytest.raises(BundleIntegrityError, match="has sha256" if behind_the_manifest else "decompressed|holds"):
        load_fake(bundle_copy, monkeypatch, module)
    assert module.deserialised == [] and not module.cuda.device


def test_a_bomb_in_a_bundle_is_refused(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_fake_engine(bundle_copy, packed=True)
    data, how = _bomb()
    (_place(bundle_copy) / "step.plan.xz").write_bytes(data)
    _recorded(bundle_copy, compression={"step.plan.xz": asdict(how)})
    module = FakeTrt(FakeRuntime())
    with pytest.raises(BundleIntegrityError, match="holds more than"):
        load_fake(bundle_copy, monkeypatch, module)
    assert module.deserialised == []


def test_records_from_before_compression_are_read(bundle_copy: Path) -> None:
    add_fake_engine(bundle_copy, packed=True)
    raw = json.loads((_place(bundle_copy) / "engine.json").read_text())
    old = {name: value for name, value in raw.items() if name != "compression"}
    read = parse_engine_record(json.dumps({**old, "record_version": 2}))
    assert read.compression == {} and read.record_version == RECORD_VERSION
    with pytest.raises(BundleSchemaError):
        parse_engine_record(json.dumps(old))
    with pytest.raises(BundleSchemaError):
        parse_engine_record(json.dumps({**raw, "compression": {"step.plan.xz": {"method": "zip"}}}))
    assert open_bundle(bundle_copy)
