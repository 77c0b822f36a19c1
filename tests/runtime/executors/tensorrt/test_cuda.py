"""The driver's errors have names, memory is given back, and nothing asynchronous happens early."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from medusa_deploy.runtime.errors import DeviceError, DeviceMemoryError, MissingDependencyError
from medusa_deploy.runtime.executors.tensorrt.cuda import Cuda
from support.fake_cuda import DeviceFaultError, FakeRuntime


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime(memory=1 << 20)


@pytest.fixture
def cuda(runtime: FakeRuntime) -> Cuda:
    return Cuda(runtime=runtime)


def test_a_device_is_named_as_engines_are(runtime: FakeRuntime, cuda: Cuda) -> None:
    cuda.allocate(1 << 16, "a test")
    device = cuda.device()
    assert (device.target, device.total_bytes, device.free_bytes) == ("sm_89", 1 << 20, (1 << 20) - (1 << 16))
    runtime.capability = (12, 0)
    assert cuda.device().target == "sm_120"


def test_without_a_driver_or_a_device_the_error_says_so(runtime: FakeRuntime) -> None:
    with pytest.raises(DeviceError, match="no GPU 1: the driver lists 1"):
        Cuda(1, runtime)
    runtime.driver = False
    with pytest.raises(DeviceError, match="no usable GPU: cudaErrorInsufficientDriver") as caught:
        Cuda(runtime=runtime)
    assert "driver" in caught.value.hint


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match="cuda-bindings can't be imported") as caught:
        Cuda()
    assert "pip install" in caught.value.hint


def test_what_does_not_fit_is_refused_with_its_numbers(cuda: Cuda) -> None:
    with pytest.raises(DeviceMemoryError, match=r"no memory for the caches: 2.0 MiB asked for, 1.0 of the device's 1.0 MiB"):
        cuda.allocate(2 << 20, "the caches")


def test_memory_is_zero_and_is_given_back(runtime: FakeRuntime, cuda: Cuda) -> None:
    memory, pinned = cuda.allocate(100, "a test"), cuda.pinned(100, "a test")
    stream, event = cuda.stream(), cuda.event()
    assert bytes(runtime.bytes_at(memory.address, 100)) == bytes(100) == pinned.bytes.tobytes()
    cuda.record(event, stream)
    cuda.free(pinned)
    assert not runtime.pinned
    handles = len(runtime.handles)
    cuda.close()
    assert not runtime.device and len(runtime.handles) == handles - 2
    cuda.close()


def test_copies_wait_for_their_turn_and_events_say_when_they_had_it(cuda: Cuda) -> None:
    memory, source, target = cuda.allocate(8, "a test"), cuda.pinned(8, "a test"), cuda.pinned(8, "a test")
    stream, start, end = cuda.stream(), cuda.event(), cuda.event()
    source.bytes[:] = 7
    cuda.record(start, stream)
    cuda.upload(memory.address, source.address, 8, stream)
    cuda.download(target.address, memory.address, 8, stream)
    cuda.record(end, stream)
    assert not cuda.is_reached(end) and not target.bytes.any(), "read too early"
    cuda.wait(end)
    assert cuda.is_reached(end) and (target.bytes == 7).all()
    assert cuda.seconds_between(start, end) > 0


def test_a_graph_replays_the_addresses_that_were_captured(runtime: FakeRuntime, cuda: Cuda) -> None:
    memory, source = cuda.allocate(8, "a test"), cuda.pinned(8, "a test")
    stream = cuda.stream()
    graph = cuda.capture(stream, lambda: cuda.upload(memory.address, source.address, 8, stream))
    cuda.synchronize(stream)
    assert bytes(runtime.bytes_at(memory.address, 8)) == bytes(8), "a capture runs nothing"
    for value in (1, 2):
        source.bytes[:] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert bytes(runtime.bytes_at(memory.address, 8)) == bytes([value] * 8)


def test_after_a_failed_capture_the_stream_still_works(runtime: FakeRuntime, cuda: Cuda) -> None:
    memory, source, stream = cuda.allocate(8, "a test"), cuda.pinned(8, "a test"), cuda.stream()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cuda.capture(stream, fail)
    runtime.capture_fails = True
    with pytest.raises(DeviceError, match="cudaStreamEndCapture failed: cudaErrorStreamCaptureUnsupported"):
        cuda.capture(stream, lambda: None)
    source.bytes[:] = 3
    cuda.upload(memory.address, source.address, 8, stream)
    cuda.synchronize(stream)
    assert bytes(runtime.bytes_at(memory.address, 8)) == bytes([3] * 8)


@pytest.mark.parametrize("fault", ["freed", "beyond", "pageable"])
def test_the_fake_catches_what_a_gpu_would(cuda: Cuda, fault: str) -> None:
    memory, source, stream = cuda.allocate(8, "a test"), cuda.pinned(16, "a test"), cuda.stream()
    ordinary = np.zeros(16, np.uint8)
    if fault == "freed":
        cuda.free(memory)
    host, nbytes = ordinary.ctypes.data if fault == "pageable" else source.address, 16 if fault == "beyond" else 8
    with pytest.raises(DeviceFaultError):
        cuda.upload(memory.address, host, nbytes, stream)


def test_the_real_package_has_every_call_that_is_made() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in dir(FakeRuntime) if name.startswith("cuda")]
    assert len(names) > 25
    assert [name for name in names if not hasattr(real, name)] == []
    for enumeration in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
        fake = getattr(FakeRuntime, enumeration)
        for member in fake:
            assert int(getattr(getattr(real, enumeration), member.name)) == int(member), member.name


def test_the_real_package_answers_as_the_fake_does_without_a_gpu() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU here")
    with pytest.raises(DeviceError, match="no usable GPU"):
        Cuda()
