"""The tiny bundle with engines that the fakes can run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_deploy.runtime.session import Session
from support.fake_cuda import FakeRuntime
from support.fake_trt import FakeTrt, FakeTrtRtx


@pytest.fixture(scope="session")
def engine_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_bundle`` with one engine for sm_89 of each fake package; steps of 1, 4, 8 and 16 rows. Never written to."""
    from support.fake_engine import add_fake_engine

    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engine") / "bundle"))
    return add_fake_engine(folder)


@pytest.fixture
def gpu() -> FakeTrt:
    """TensorRT on a fake GPU of 1 GiB."""
    return FakeTrt(FakeRuntime())


@pytest.fixture(params=[FakeTrt, FakeTrtRtx], ids=["tensorrt", "tensorrt-rtx"])
def either_gpu(request: pytest.FixtureRequest) -> FakeTrt:
    """Each of the two packages."""
    module: FakeTrt = request.param(FakeRuntime())
    return module


@pytest.fixture
def on_gpu(engine_bundle: Path, gpu: FakeTrt, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Loads ``engine_bundle`` on ``gpu``, with options of ``load``."""
    from support.fake_engine import load_fake

    return lambda **options: load_fake(engine_bundle, monkeypatch, gpu, **options)
