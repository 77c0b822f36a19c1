"""A CUDA runtime without a GPU, as unfavourable as a real one may be.

Device memory is bytes behind made-up addresses, 0xFF until somebody writes them. Streams do nothing until somebody waits: a host
that reads early sees old bytes, and a host that overwrites its own source too early has the new bytes copied. Then a *slow*
device does what is waited for and no more; a *fast* one does all there is, so that what is reused too early is overwritten.
Copies take pinned memory only, and every byte must lie in a block that is alive.
"""

from __future__ import annotations

import ctypes
import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

_Result = tuple[Any, ...]


class DeviceFaultError(AssertionError):
    """The program under test did what a GPU would answer with a fault, or with garbage."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


@dataclass(eq=False)
class Handle:
    """A stream (``queue``: what it has yet to do), an event (``done``: whether it was reached), or a graph of ``operations``."""

    number: int
    operations: tuple[Callable[[], None], ...] = ()
    queue: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None
    done: bool = True
    stream: Handle | None = None
    ticks: int = 0

    def __int__(self) -> int:
        return self.number


class FakeRuntime:
    """Stands in for ``cuda.bindings.runtime``. ``calls`` counts calls by name; ``capability`` is the GPU's."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaDeviceAttr = cudaDeviceAttr
    cudaHostAllocDefault = 0
    cudaEventDefault = 0
    cudaStreamNonBlocking = 1

    def __init__(
        self, *, memory: int = 1 << 30, capability: tuple[int, int] = (8, 9), devices: int = 1, fast: bool = False
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.capability, self.devices = capability, devices
        self.total = memory
        self.fast = fast
        self.driver = True
        self.name, self.driver_version = "Fake GPU", 13000
        self.capture_fails = False
        self.device: dict[int, bytearray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.handles: dict[int, Handle] = {}
        self._next_address = 0x7F00_0000_0000
        self._next_handle = 1
        self._ticks = 0
        self._default = self._handle()

    # -- what tests ask --------------------------------------------------------------------------------------------

    @property
    def synchronisations(self) -> int:
        """Calls that block until the device has caught up."""
        names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
        return sum(self.calls[name] for name in names)

    @property
    def allocations(self) -> int:
        """Blocks of memory asked for so far, on either side."""
        return self.calls["cudaMalloc"] + self.calls["cudaHostAlloc"]

    def bytes_at(self, address: int, nbytes: int) -> memoryview:
        """Device memory, all of it inside one living block."""
        for base, block in self.device.items():
            if base <= address and address + nbytes <= base + len(block):
                return memoryview(block)[address - base : address - base + nbytes]
        raise DeviceFaultError(f"{nbytes} bytes at {address:#x} are in no block of device memory")

    def enqueue(self, stream: int, operation: Callable[[], None]) -> None:
        """For the fake engine: one kernel."""
        self._push(self.handles[stream], operation)

    def _push(self, stream: Handle, operation: Callable[[], None]) -> None:
        (stream.queue if stream.captured is None else stream.captured).append(operation)

    def _run(self, stream: Handle, until: Handle | None = None) -> None:
        while stream.queue and (self.fast or until is None or not until.done):
            self._ticks += 1
            stream.queue.pop(0)()

    def _host(self, address: int, nbytes: int) -> memoryview:
        for base, block in self.pinned.items():
            if base <= address and address + nbytes <= base + len(block):
                return memoryview(block)[address - base : address - base + nbytes]
        raise DeviceFaultError(f"{nbytes} bytes at {address:#x} aren't pinned host memory")

    def _handle(self) -> Handle:
        handle = Handle(self._next_handle)
        self.handles[handle.number] = handle
        self._next_handle += 1
        return handle

    def _blocks(self, name: str) -> None:
        self.calls[name] += 1
        if any(handle.captured is not None for handle in self.handles.values()):
            raise DeviceFaultError(f"{name} while a stream is captured")

    # -- the API ---------------------------------------------------------------------------------------------------

    def cudaGetDeviceCount(self) -> _Result:
        return (cudaError_t.cudaSuccess, self.devices) if self.driver else (cudaError_t.cudaErrorInsufficientDriver, None)

    def cudaSetDevice(self, device: int) -> _Result:
        return (cudaError_t.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute: cudaDeviceAttr, device: int) -> _Result:
        return cudaError_t.cudaSuccess, self.capability[attribute - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    def cudaGetDeviceProperties(self, device: int) -> _Result:
        return cudaError_t.cudaSuccess, SimpleNamespace(name=self.name.encode() + b"\0")

    def cudaDriverGetVersion(self) -> _Result:
        return cudaError_t.cudaSuccess, self.driver_version

    def cudaMemGetInfo(self) -> _Result:
        return cudaError_t.cudaSuccess, self.total - sum(map(len, self.device.values())), self.total

    def cudaGetLastError(self) -> _Result:
        return (cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, error: cudaError_t) -> _Result:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaMalloc(self, nbytes: int) -> _Result:
        self._blocks("cudaMalloc")
        if nbytes > self.cudaMemGetInfo()[1]:
            return cudaError_t.cudaErrorMemoryAllocation, None
        address, self._next_address = self._next_address, self._next_address + nbytes + 4096 - nbytes % 256
        self.device[address] = bytearray(b"\xff" * nbytes)
        return cudaError_t.cudaSuccess, address

    def cudaFree(self, address: int) -> _Result:
        self.calls["cudaFree"] += 1
        del self.device[address]
        return (cudaError_t.cudaSuccess,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> _Result:
        self._blocks("cudaHostAlloc")
        block = np.full(nbytes, 0xFF, np.uint8)
        self.pinned[block.ctypes.data] = block
        return cudaError_t.cudaSuccess, block.ctypes.data

    def cudaFreeHost(self, address: int) -> _Result:
        self.calls["cudaFreeHost"] += 1
        del self.pinned[address]
        return (cudaError_t.cudaSuccess,)

    def cudaMemset(self, address: int, value: int, nbytes: int) -> _Result:
        self.bytes_at(address, nbytes)
        self._push(self._default, lambda: ctypes.memset(_pointer(self.bytes_at(address, nbytes)), value, nbytes) and None)
        return (cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: Handle) -> _Result:
        self.calls["cudaMemsetAsync"] += 1
        self.bytes_at(address, nbytes)
        self._push(stream, lambda: ctypes.memset(_pointer(self.bytes_at(address, nbytes)), value, nbytes) and None)
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: cudaMemcpyKind, stream: Handle) -> _Result:
        self.calls[f"copy {kind.name.removeprefix('cudaMemcpy')}"] += 1
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice

        def copy() -> None:
            device, host = (target, source) if to_device else (source, target)
            ends = self.bytes_at(device, nbytes), self._host(host, nbytes)
            into, out_of = ends if to_device else ends[::-1]
            into[:] = out_of

        self.bytes_at(target if to_device else source, nbytes)
        self._host(source if to_device else target, nbytes)
        self._push(stream, copy)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> _Result:
        return cudaError_t.cudaSuccess, self._handle()

    def cudaStreamDestroy(self, stream: Handle) -> _Result:
        del self.handles[stream.number]
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Handle) -> _Result:
        self._blocks("cudaStreamSynchronize")
        self._run(stream)
        return (cudaError_t.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> _Result:
        self._blocks("cudaDeviceSynchronize")
        for handle in list(self.handles.values()):
            self._run(handle)
        return (cudaError_t.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> _Result:
        return cudaError_t.cudaSuccess, self._handle()

    def cudaEventDestroy(self, event: Handle) -> _Result:
        del self.handles[event.number]
        return (cudaError_t.cudaSuccess,)

    def cudaEventRecord(self, event: Handle, stream: Handle) -> _Result:
        event.done, event.stream = False, stream

        def reach() -> None:
            event.done, event.ticks = True, self._ticks

        self._push(stream, reach)
        return (cudaError_t.cudaSuccess,)

    def cudaEventSynchronize(self, event: Handle) -> _Result:
        self._blocks("cudaEventSynchronize")
        if event.stream is not None:
            self._run(event.stream, event)
        return (cudaError_t.cudaSuccess,)

    def cudaEventQuery(self, event: Handle) -> _Result:
        return (cudaError_t.cudaSuccess if event.done else cudaError_t.cudaErrorNotReady,)

    def cudaEventElapsedTime(self, start: Handle, end: Handle) -> _Result:
        if not (start.done and end.done):
            raise DeviceFaultError("the time between events that weren't reached")
        return cudaError_t.cudaSuccess, float(end.ticks - start.ticks) * 1e-3

    def cudaStreamBeginCapture(self, stream: Handle, mode: cudaStreamCaptureMode) -> _Result:
        stream.captured = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Handle) -> _Result:
        captured, stream.captured = stream.captured, None
        assert captured is not None
        if self.capture_fails:
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        self.calls["captures"] += 1
        graph = self._handle()
        graph.operations = tuple(captured)
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> _Result:
        launchable = self._handle()
        launchable.operations = graph.operations
        return cudaError_t.cudaSuccess, launchable

    def cudaGraphDestroy(self, graph: Handle) -> _Result:
        del self.handles[graph.number]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> _Result:
        self.calls["cudaGraphLaunch"] += 1
        assert graph.number in self.handles, "a graph that was destroyed"
        for operation in graph.operations:
            self._push(stream, operation)
        return (cudaError_t.cudaSuccess,)


def _pointer(view: memoryview) -> Any:
    return (ctypes.c_char * len(view)).from_buffer(view)
