"""Weights arrive whole, wherever their pieces lie, through a buffer that is smaller than they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.runtime.errors import BundleIntegrityError, DeviceMemoryError
from medusa_deploy.runtime.executors.tensorrt import weights as trt_weights
from medusa_deploy.runtime.executors.tensorrt.cuda import Cuda
from medusa_deploy.runtime.executors.tensorrt.weights import upload_weights
from medusa_deploy.runtime.files.bundle import Bundle
from medusa_deploy.runtime.files.weight_inputs import WeightInput, WeightPiece
from support.fake_cuda import FakeRuntime
from support.records import manifest

WEIGHTS = (
    WeightInput("one", "int8", (1000,), (WeightPiece("a.bin", 0, 1000),)),
    WeightInput(
        "merged", "int8", (2334,), (WeightPiece("a.bin", 1000, 333), WeightPiece("b.bin", 7, 2000), WeightPiece("a.bin", 100, 1))
    ),
    WeightInput("tiny", "int8", (3,), (WeightPiece("b.bin", 0, 3),)),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    rng = np.random.default_rng(0)
    for name, size in (("a.bin", 1333), ("b.bin", 2007)):
        (tmp_path / name).write_bytes(rng.bytes(size))
    return Bundle(tmp_path, manifest())


@pytest.mark.parametrize("staging", [64, 4096, 1 << 20])
@pytest.mark.parametrize("fast", [False, True])
def test_pieces_lie_one_after_another(bundle: Bundle, staging: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_weights, "STAGING_BYTES", staging)
    runtime = FakeRuntime(fast=fast)
    cuda = Cuda(runtime=runtime)
    addresses = upload_weights(cuda, cuda.stream(), bundle, WEIGHTS)
    for weight in WEIGHTS:
        files = {piece.file: bundle.path(piece.file).read_bytes() for piece in weight.pieces}
        expected = b"".join(files[piece.file][piece.offset :][: piece.nbytes] for piece in weight.pieces)
        assert addresses[weight.name] % 256 == 0
        assert bytes(runtime.bytes_at(addresses[weight.name], len(expected))) == expected
    assert len(runtime.device) == 1 and not runtime.pinned, "one block on the device, none left on the host"


def test_a_file_that_ends_too_early(bundle: Bundle) -> None:
    (bundle.folder / "b.bin").write_bytes(b"short")
    cuda = Cuda(runtime=FakeRuntime())
    with pytest.raises(BundleIntegrityError, match="b.bin ends before byte 2007"):
        upload_weights(cuda, cuda.stream(), bundle, WEIGHTS)


def test_weights_that_do_not_fit(bundle: Bundle) -> None:
    cuda = Cuda(runtime=FakeRuntime(memory=1024))
    with pytest.raises(DeviceMemoryError, match="no memory for 3 weights"):
        upload_weights(cuda, cuda.stream(), bundle, WEIGHTS)


def test_an_engine_that_holds_its_weights_needs_none(bundle: Bundle) -> None:
    runtime = FakeRuntime()
    cuda = Cuda(runtime=runtime)
    assert upload_weights(cuda, cuda.stream(), bundle, ()) == {} and not runtime.device
