"""What TensorRT-RTX compiles is kept beside the engine, foreign files are ignored, and warm sessions have their graphs."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import Session
from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.executors.tensorrt.executor import TrtExecutor
from medusa_deploy.runtime.executors.tensorrt.runtime_cache import RuntimeCache
from support.fake_cuda import FakeRuntime
from support.fake_engine import TARGET, add_fake_engine, load_fake
from support.fake_trt import FakeRuntimeCache, FakeTrt, FakeTrtRtx

ASKED: dict[str, Any] = {"token_ids": [3, 4, 5], "max_new_tokens": 12, "ignore_eos": True}
KEY = {"gpu": "a", "driver": "1"}


@pytest.fixture
def rtx_bundle(bundle_copy: Path) -> Path:
    return add_fake_engine(bundle_copy, backend="tensorrt-rtx")


def files(bundle: Path) -> list[Path]:
    return sorted((bundle / "engines" / TARGET).glob("*.cache"))


def loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch, gpu: FakeTrt | None = None, **options: Any) -> Session:
    return load_fake(bundle, monkeypatch, gpu or FakeTrtRtx(FakeRuntime()), backend="tensorrt-rtx", **options)


def state(session: Session) -> str:
    assert isinstance(session.executor, TrtExecutor) and session.executor.contexts.cache is not None
    return session.executor.contexts.cache.state


def test_the_next_load_finds_what_this_one_has_compiled(rtx_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = loaded(rtx_bundle, monkeypatch)
    assert state(session) == "empty"
    tokens = session.generate(**ASKED).token_ids
    del session
    gc.collect()
    [kept] = files(rtx_bundle)
    gpu = FakeTrtRtx(FakeRuntime())
    session = loaded(rtx_bundle, monkeypatch, gpu)
    assert state(session) == "loaded" and gpu.engines[0].configs[0].cache.compiled
    assert session.generate(**ASKED).token_ids == tokens
    before = kept.stat().st_mtime_ns
    del session
    gc.collect()
    assert kept.stat().st_mtime_ns == before, "nothing new: nothing is written"


@pytest.mark.parametrize("other", ["name", "driver"])
def test_another_gpu_or_driver_has_a_file_of_its_own(rtx_bundle: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    for changed in (False, True):
        runtime = FakeRuntime()
        if changed:
            setattr(runtime, {"name": "name", "driver": "driver_version"}[other], "Other GPU" if other == "name" else 14000)
        session = loaded(rtx_bundle, monkeypatch, FakeTrtRtx(runtime))
        assert state(session) == "empty"
        session.generate(**ASKED)
        del session
        gc.collect()
    assert len(files(rtx_bundle)) == 2


def test_a_damaged_or_foreign_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    made = FakeRuntimeCache()
    made.compiled = {"a kernel"}
    cache = RuntimeCache(tmp_path, KEY)
    assert cache.save(made) and not cache.save(made)
    whole = cache.path.read_bytes()
    for content, expected in (
        (whole, "loaded"), (whole[:-1], "damaged"), (whole[:-1] + b"x", "damaged"), (b"", "damaged"), (b"\n" * 9000, "damaged"),
        (b"[" * 4000, "damaged"), (whole.replace(b'"a"', b'"b"', 1), "foreign"),
        (_with_blob(whole, json.dumps(["8.8", "kernel"]).encode()), "foreign"),
    ):  # fmt: skip
        cache.path.write_bytes(content)
        other, found = RuntimeCache(tmp_path, KEY), FakeRuntimeCache()
        other.fill(found)
        assert (other.state, bool(found.compiled)) == (expected, expected == "loaded"), content[:80]
        if expected != "loaded":
            assert other.save(made) and cache.path.read_bytes() == whole
    link = tmp_path / "elsewhere"
    shutil.move(cache.path, link)
    cache.path.symlink_to(link)
    other = RuntimeCache(tmp_path, KEY)
    other.fill(FakeRuntimeCache())
    assert other.state == "foreign"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _with_blob(content: bytes, blob: bytes) -> bytes:
    import hashlib

    header = json.loads(content.partition(b"\n")[0])
    header |= {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    return json.dumps(header).encode() + b"\n" + blob


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    cache = RuntimeCache(tmp_path / "nowhere", KEY)
    with pytest.warns(RuntimeWarning, match="no runtime cache: can't write"):
        assert not cache.save(FakeRuntimeCache())


def test_a_warm_session_has_the_graphs_of_its_sizes(rtx_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = loaded(rtx_bundle, monkeypatch)
    expected = {name: cold.generate(**ASKED, **options).token_ids for name, options in _WAYS.items()}
    gpu = FakeTrtRtx(FakeRuntime())
    session = loaded(rtx_bundle, monkeypatch, gpu, warm=True)
    assert isinstance(session.executor, TrtExecutor)
    graphs = dict(session.executor.contexts.graphs)
    assert graphs and files(rtx_bundle), "kernels are kept without waiting for the end"
    assert session.slots.lengths.tolist() == [0]
    launched = gpu.cuda.calls["cudaGraphLaunch"]
    for name, options in _WAYS.items():
        assert session.generate(**ASKED, **options).token_ids == expected[name]
    assert gpu.cuda.calls["cudaGraphLaunch"] > launched
    sizes = {(key[0], key[1]) for key in session.executor.contexts.graphs} - {(key[0], key[1]) for key in graphs}
    assert all(rows != carried for rows, carried in sizes), "steady steps were captured before"


_WAYS: dict[str, dict[str, Any]] = {"plain": {"speculative": False}, "tree": {"rows": 4}}


def test_backends_without_graphs_take_no_warm(tiny_bundle: Path) -> None:
    from medusa_deploy.runtime import load

    with pytest.raises(UsageError, match="takes no warm"):
        load(tiny_bundle, warm=True)
