"""A TensorRT whose engines run their ONNX graph with ONNX Runtime, on the fake driver's memory.

It trusts nobody: shapes must lie in the profile, every tensor needs an address of living memory, a cache's output must have the
address of its input, and no output may overlap anything else. ``hazard``: caches are written before the rest of the graph runs,
as an engine may do that updates them in place.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from medusa_deploy.runtime.files.engine_record import Profile
from support.fake_cuda import DeviceFaultError, FakeRuntime

_TYPES = {"tensor(int64)": "INT64", "tensor(bool)": "BOOL", "tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
_NUMPY = {"INT64": "int64", "BOOL": "bool", "FLOAT": "float32", "HALF": "float16"}
NUMPY_NAMES = {name: _NUMPY[kind] for name, kind in _TYPES.items()}
AXES = {
    "tokens": "BN", "positions": "BN", "ancestors": "BNN", "forced": "B", "write_index": "B", "columns": "T", "logit_rows": "BR",
    "kept": "B", "kept_count": "B", "draft_slots": "BN", "head_rows": "W",
}  # fmt: skip


def axes_of(name: str) -> dict[int, str]:
    """Which axes of an input vary, and with what."""
    if name.startswith("carried_"):
        return {0: "B", 2: "P"}
    return dict(enumerate(AXES.get(name, "B")))


def _enum(name: str, *members: str) -> Any:
    return enum.Enum(name, list(members))  # type: ignore[misc]


class FakeTrt:
    """Stands in for the package ``tensorrt``. One instance a test; ``cuda`` is the driver whose memory its engines use.

    ``outputs``: is given the outputs of each call, by name, before they reach device memory; it may change them. ``refuse``: the
    next calls that are put into a stream are refused, that many.
    """

    __version__ = "9.9"
    DataType = _enum("DataType", "INT64", "BOOL", "FLOAT", "HALF")
    TensorIOMode = _enum("TensorIOMode", "INPUT", "OUTPUT")
    TensorLocation = _enum("TensorLocation", "DEVICE", "HOST")
    ExecutionContextAllocationStrategy = _enum("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED")

    class ILogger:
        Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING")

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: FakeRuntime, *, hazard: bool = False) -> None:
        self.cuda, self.hazard = cuda, hazard
        self.deserialised: list[str] = []
        self.enqueued: list[dict[str, tuple[int, ...]]] = []
        self.aliases: Callable[[str], str | None] = lambda name: (
            name.replace("present", "past") if name.startswith("present") else None
        )
        self.on_host: set[str] = set()
        self.outputs: Callable[[dict[str, np.ndarray]], None] = lambda _found: None
        self.refuse = 0
        self.engines: list[FakeEngine] = []

    def Runtime(self, log: Any) -> FakeLoader:
        return FakeLoader(self, log)


class FakeTrtRtx(FakeTrt):
    """Stands in for ``tensorrt_rtx``, which has runtime configurations and says when a context can be captured."""

    ComputeCapability = _enum("ComputeCapability", "NONE", "CURRENT", "SM120", "SM121", "SM75", "SM80", "SM86", "SM89")
    CudaGraphStrategy = _enum("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE")
    DynamicShapesKernelSpecializationStrategy = _enum("DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE")


class FakeLoader:
    def __init__(self, module: FakeTrt, log: Any) -> None:
        self.module, self.log = module, log

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
        try:
            facts = json.loads(data)
        except ValueError:
            self.log.log(self.log.Severity.ERROR, "the plan is damaged")
            return None
        self.module.deserialised.append(facts["onnx"])
        engine = FakeEngine(self.module, self.log, facts)
        self.module.engines.append(engine)
        return engine


class FakeRuntimeCache:
    """Holds what was compiled: the shapes of calls. It takes what another one of this version wrote."""

    def __init__(self) -> None:
        self.compiled: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(["9.9", *sorted(self.compiled)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        version, *compiled = json.loads(blob)
        if version != "9.9":
            return False
        self.compiled |= set(compiled)
        return True


class FakeConfig:
    """A runtime configuration of the RTX package."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> None:
        self.cache = cache


class FakeEngine:
    """A plan: the path of an ONNX file, and ranges of each input's axes by profile."""

    def __init__(self, module: FakeTrt, log: Any, facts: dict[str, Any]) -> None:
        self.module, self.log = module, log
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 3, 1, 1
        self.session = onnxruntime.InferenceSession(facts["onnx"], options, providers=["CPUExecutionProvider"])
        self.ranges: list[dict[str, list[list[int]]]] = facts["profiles"]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.contexts: list[FakeContext] = []
        self.configs: list[FakeConfig] = []

    num_optimization_profiles = property(lambda self: len(self.ranges))
    num_io_tensors = property(lambda self: len(self.names))

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.TensorIOMode.INPUT if name in self.inputs else self.module.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.HOST if name in self.module.on_host else self.module.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return self.module.DataType[_TYPES[(self.inputs | self.outputs)[name].type]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in (self.inputs | self.outputs)[name].shape]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.module.aliases(name)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 4096 * (profile + 1)

    def create_runtime_config(self) -> FakeConfig:
        self.configs.append(FakeConfig())
        return self.configs[-1]

    def create_execution_context(self, how: Any) -> FakeContext:
        strategy = how.strategy if isinstance(how, FakeConfig) else how
        assert strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """Shapes and addresses are what they were when a call was enqueued or captured, whatever becomes of them later."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.module = engine.module
        self.profile = -1
        self.scratch = (0, 0)
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in engine.inputs}
        self.shapes = {name: shape for name, shape in shapes.items() if min(shape) >= 0}
        self.addresses: dict[str, int] = {}
        self._settled: dict[str, tuple[int, ...]] | None = None
        if isinstance(self.module, FakeTrtRtx):
            self.is_stream_capturable = lambda stream: self._settled == self.shapes

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.scratch = (address, nbytes)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self.engine.ranges[self.profile].get(name)
        if (
            ranges is None
            or len(ranges) != len(shape)
            or any(not low <= size <= high for size, (low, _, high) in zip(shape, ranges, strict=True))
        ):
            self.engine.log.log(self.engine.log.Severity.ERROR, f"{name} {shape} is outside profile {self.profile}: {ranges}")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.module.cuda
        if self.module.refuse:
            self.module.refuse -= 1
            return False
        missing = set(self.engine.inputs) - set(self.shapes), set(self.engine.names) - set(self.addresses)
        if any(missing):
            raise DeviceFaultError(f"no shape or address for {missing}")
        if self.scratch[1] < self.engine.get_device_memory_size_for_profile_v2(self.profile):
            raise DeviceFaultError("too little scratch memory")
        capturing = cuda.handles[stream].captured is not None
        if capturing and self._settled != self.shapes:
            raise DeviceFaultError("shapes were captured that were never enqueued")
        self._settled = dict(self.shapes)
        if self.engine.configs:
            self.engine.configs[0].cache.compiled.add(json.dumps([self.profile, *sorted(self.shapes.items())]))
        self.module.enqueued.append(dict(self.shapes))
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        cuda.enqueue(stream, lambda: self._run(shapes, addresses))
        return True

    # -- on the device ---------------------------------------------------------------------------------------------

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self.engine
        feeds = {name: self._array(name, shapes[name], addresses[name]).copy() for name in engine.inputs}
        found = self._computed(feeds)
        caches = {name: engine.get_aliased_input_tensor(name) for name in engine.outputs}
        if self.module.hazard and any(caches.values()):
            feeds |= {past: found[present] for present, past in caches.items() if past is not None}
            found = self._computed(feeds)
        self._check_places(shapes, addresses, {name: value.nbytes for name, value in found.items()}, caches)
        self.module.outputs(found)
        for name, value in found.items():
            self._array(name, value.shape, addresses[name])[...] = value

    def _computed(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = list(self.engine.outputs)
        try:
            return dict(zip(outputs, self.engine.session.run(outputs, feeds), strict=True))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's own classes derive from nothing narrower
            raise DeviceFaultError(str(error)) from None

    def _array(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        dtype = np.dtype(_NUMPY[self.engine.get_tensor_dtype(name).name])
        if address % 256:
            raise DeviceFaultError(f"{name} at {address:#x} isn't aligned")
        view = self.module.cuda.bytes_at(address, prod(shape) * dtype.itemsize)
        return np.frombuffer(view, dtype).reshape(shape)

    def _check_places(
        self,
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        outputs: dict[str, int],
        caches: dict[str, str | None],
    ) -> None:
        """Caches share memory with themselves; apart from them, an output overlaps nothing."""
        for present, past in caches.items():
            if past is not None and addresses[present] != addresses[past]:
                raise DeviceFaultError(f"{present} isn't at the address of {past}")
        inputs = {
            name: prod(shape) * np.dtype(_NUMPY[self.engine.get_tensor_dtype(name).name]).itemsize
            for name, shape in shapes.items()
        }
        places = [(name, addresses[name], addresses[name] + nbytes) for name, nbytes in [*outputs.items(), *inputs.items()]]
        for index, (one, start, end) in enumerate(places[: len(outputs)]):
            for other, other_start, other_end in places[index + 1 :]:
                if start < other_end and other_start < end and caches.get(one) != other:
                    raise DeviceFaultError(f"{one} overlaps {other}")


def write_plan(path: Path, onnx: Path, profiles: Sequence[Profile]) -> None:
    """The bytes that the fake deserialises: which graph, and the ranges of each axis of each input in each profile."""
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    ranges = []
    for profile in profiles:
        sizes = {"B": profile.slots, "N": profile.rows, "R": profile.logit_rows, "T": profile.columns, "P": profile.carried}
        sizes["W"] = profile.head_rows
        by_name = {}
        for value in session.get_inputs():
            varying = axes_of(value.name)
            by_name[value.name] = [
                list(sizes[varying[axis]]) if axis in varying else [size] * 3 for axis, size in enumerate(value.shape)
            ]
        ranges.append(by_name)
    path.write_text(json.dumps({"onnx": str(onnx), "profiles": ranges}))
