"""The part of the CUDA runtime that executors use: memory, copies, events and graphs. Every failure is a named exception.

No copy happens implicitly: an asynchronous copy takes addresses of pinned host memory or device memory, and a number of bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DeviceError, DeviceMemoryError, MissingDependencyError

_NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary", "cudaErrorInitializationError")
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_NOT_READY = "cudaErrorNotReady"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: its index, its architecture as engines name it (``target``, such as ``sm_89``), and its memory in bytes.

    ``name``: as its vendor sells it. ``driver``: the newest CUDA version that its driver takes, such as ``13000``.
    """

    index: int
    target: str
    total_bytes: int
    free_bytes: int
    name: str = ""
    driver: int = 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A block of device memory."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PinnedMemory:
    """A block of page-locked host memory. ``bytes``: view of it, uint8 [nbytes]."""

    address: int
    bytes: np.ndarray


class Cuda:
    """The runtime API on one device. It owns the memory, streams, events and graphs made through it until :meth:`close`.

    Handles of streams, events and graphs are opaque; ``int(stream)`` is what TensorRT takes.
    """

    def __init__(self, device: int = 0, runtime: Any = None) -> None:
        """Opens ``device``. ``runtime`` replaces ``cuda.bindings.runtime`` if given.

        Raises:
            MissingDependencyError: cuda-bindings isn't installed.
            DeviceError: there is no driver, or no such device.
        """
        self._runtime = _import_runtime() if runtime is None else runtime
        self._release: dict[Any, Callable[[], object]] = {}
        found = self._call("cudaGetDeviceCount")
        if not 0 <= device < found:
            raise DeviceError(f"no GPU {device}: the driver lists {found}", hint="medusa-deploy doctor shows what is there")
        self._call("cudaSetDevice", device)
        self.index = device

    # -- the device ------------------------------------------------------------------------------------------------

    def device(self) -> Device:
        """Returns the device, with the memory that is free now."""
        attributes = self._runtime.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", getattr(attributes, f"cudaDevAttrComputeCapability{part}"), self.index))
            for part in ("Major", "Minor")
        )
        free, total = self.memory()
        name = self._call("cudaGetDeviceProperties", self.index).name
        text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        return Device(self.index, f"sm_{major}{minor}", total, free, text.rstrip("\0"), int(self._call("cudaDriverGetVersion")))

    def memory(self) -> tuple[int, int]:
        """Returns the device's memory in bytes: (free, total)."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, purpose: str) -> DeviceMemory:
        """Allocates a zeroed block of device memory.

        Raises:
            DeviceMemoryError: too little memory is free. The message has the bytes asked for, their purpose, and the bytes free.
        """
        address = int(self._allocate("cudaMalloc", nbytes, purpose))
        self._release[address] = lambda: self._runtime.cudaFree(address)
        self._call("cudaMemset", address, 0, nbytes)
        self._call("cudaDeviceSynchronize")  # a stream that doesn't wait for the default one would overtake the zeros
        return DeviceMemory(address, nbytes)

    def pinned(self, nbytes: int, purpose: str) -> PinnedMemory:
        """Allocates a zeroed block of page-locked host memory.

        Raises:
            DeviceMemoryError: the host refused the allocation.
        """
        address = int(self._allocate("cudaHostAlloc", nbytes, purpose, self._runtime.cudaHostAllocDefault))
        self._release[address] = lambda: self._runtime.cudaFreeHost(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        array[:] = 0
        return PinnedMemory(address, array)

    def _allocate(self, name: str, nbytes: int, purpose: str, *flags: int) -> Any:
        try:
            return self._call(name, nbytes, *flags)
        except DeviceMemoryError:
            free, total = self.memory()
            raise DeviceMemoryError(
                f"no memory for {purpose}: {nbytes / 2**20:.1f} MiB asked for, "
                f"{free / 2**20:.1f} of the device's {total / 2**20:.1f} MiB are free",
                hint="free the GPU, load with fewer slots, or export with a smaller --capacity or --batch",
            ) from None

    # -- streams, events, copies -----------------------------------------------------------------------------------

    def stream(self) -> Any:
        """Creates a stream that doesn't wait for the default one."""
        stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self._release["stream", int(stream)] = lambda: self._runtime.cudaStreamDestroy(stream)
        return stream

    def event(self) -> Any:
        """Creates an event that records the time at which it is reached."""
        event = self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDefault)
        self._release["event", int(event)] = lambda: self._runtime.cudaEventDestroy(event)
        return event

    def record(self, event: Any, stream: Any) -> None:
        """Enqueues ``event``: it is reached when everything enqueued before it is done."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: Any) -> None:
        """Blocks until ``event`` is reached."""
        self._call("cudaEventSynchronize", event)

    def is_reached(self, event: Any) -> bool:
        """Tells if ``event`` is reached, without waiting for it."""
        (error, *_) = self._runtime.cudaEventQuery(event)
        if error.name == _NOT_READY:
            return False
        self._check("cudaEventQuery", error)
        return True

    def seconds_between(self, start: Any, end: Any) -> float:
        """Returns the device time between two events that were reached, in seconds."""
        return float(self._call("cudaEventElapsedTime", start, end)) / 1e3

    def synchronize(self, stream: Any) -> None:
        """Blocks until the stream is empty."""
        self._call("cudaStreamSynchronize", stream)

    def upload(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Enqueues a copy from pinned host memory to device memory. The source must stay unchanged until the copy is done."""
        self._copy(target, source, nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Enqueues a copy from device memory to pinned host memory. An event recorded after it tells when it is done."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToHost", stream)

    def clear(self, target: int, nbytes: int, stream: Any) -> None:
        """Enqueues zeros for ``nbytes`` bytes of device memory."""
        self._call("cudaMemsetAsync", target, 0, nbytes, stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, nbytes, getattr(self._runtime.cudaMemcpyKind, kind), stream)

    # -- graphs ----------------------------------------------------------------------------------------------------

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """Captures the calls that ``enqueue`` puts into the stream, and returns them as a graph. Nothing runs now.

        Raises:
            DeviceError: one of the calls can't be captured. The stream stays usable.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            self._runtime.cudaStreamEndCapture(stream)
            self._runtime.cudaGetLastError()
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            launchable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._runtime.cudaGraphDestroy(graph)
        self._release["launchable", int(launchable)] = lambda: self._runtime.cudaGraphExecDestroy(launchable)
        return launchable

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueues a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    # -- calls and ownership ---------------------------------------------------------------------------------------

    def free(self, memory: DeviceMemory | PinnedMemory) -> None:
        """Frees one block before :meth:`close`. No call in a stream may still use it."""
        self._release.pop(memory.address)()

    def close(self) -> None:
        """Waits for the device, then frees everything, newest first. All handles and addresses are invalid afterwards."""
        if self._release:
            self._runtime.cudaDeviceSynchronize()
        while self._release:
            self._release.popitem()[1]()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls the runtime's function ``name``. Returns its only result, or a tuple of its results."""
        error, *results = getattr(self._runtime, name)(*arguments)
        self._check(name, error)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, name: str, error: Any) -> None:
        if int(error) == 0:
            return
        self._runtime.cudaGetLastError()  # clears an error that isn't sticky, so that it is reported once
        if error.name == _OUT_OF_MEMORY:
            raise DeviceMemoryError(f"{name}: out of memory", hint="free the GPU, or use a smaller model or capacity")
        if error.name in _NO_DRIVER:
            raise DeviceError(
                f"no usable GPU: {error.name}", hint="install NVIDIA's driver, or update it; --backend cpu needs no GPU"
            )
        _, text = self._runtime.cudaGetErrorString(error)
        said = text.decode(errors="replace") if isinstance(text, bytes) else text
        raise DeviceError(f"{name} failed: {error.name} ({said})", hint="report this with the output of: medusa-deploy doctor")


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"cuda-bindings can't be imported: {error}", hint="install it with: pip install 'medusa-deploy[tensorrt-rtx]'"
        ) from None
    return runtime
