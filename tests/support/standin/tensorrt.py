"""The part of the package ``tensorrt`` that our adapter calls, with nothing behind it; importable under that name.

An "ONNX file" is JSON for it: ``inputs`` (name to shape), and ``do``, what the builder does. A plan is JSON too: what was asked.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

__version__ = "11.4.0"


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3


class IProgressMonitor:
    pass


class IStreamWriter:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    VERSION_COMPATIBLE = 1
    EXCLUDE_LEAN_RUNTIME = 2
    REFIT = 3
    WEIGHT_STREAMING = 4


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1


class _Tensor:
    def __init__(self, name: str, shape: list[int]) -> None:
        self.name, self.shape, self.dtype = name, shape, "DataType.HALF"


class _Network:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "version 10 would choose precisions itself"
        self.raw: dict[str, Any] = {}
        self.num_layers, self.num_outputs = 3, 1

    @property
    def num_inputs(self) -> int:
        return len(self.raw["inputs"])

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(*list(self.raw["inputs"].items())[index])

    def get_output(self, index: int) -> _Tensor:
        return _Tensor("y", [-1])


class _Refusal:
    def desc(self) -> str:
        return "no such operator"

    def node_name(self) -> str:
        return "node_7"

    def node_operator(self) -> str:
        return "Surprise"


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network, self.num_errors = network, 0

    def parse_from_file(self, path: str) -> bool:
        self._network.raw = json.loads(Path(path).read_text())
        self.num_errors = int(self._network.raw["do"] == "refuse")
        return not self.num_errors

    def get_error(self, index: int) -> _Refusal:
        return _Refusal()


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, smallest: list[int], best: list[int], largest: list[int]) -> None:
        assert len(smallest) == len(best) == len(largest)
        self.shapes[name] = [smallest, best, largest]


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+1"


class _Config:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.profiles: list[Any] = []
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self._cache: _TimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.append(flag.name)

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, data: bytes) -> _TimingCache | None:
        return None if data == b"damaged" else _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> _TimingCache:
        assert self._cache is not None
        return self._cache


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        return self._plan(network, config)

    def build_serialized_network_to_stream(self, network: _Network, config: _Config, writer: Any) -> bool:
        plan = self._plan(network, config)
        return plan is not None and writer.write(memoryview(plan)) == len(plan)

    def _plan(self, network: _Network, config: Any) -> bytes | None:
        config.progress_monitor.phase_start("Computing profile costs", None, 2)
        for step in range(2):
            if not config.progress_monitor.step_complete("Computing profile costs", step):
                return None
        self._logger.log(ILogger.Severity.WARNING, "a warning")
        sys.stdout.write("noise of a library\n")
        todo = network.raw["do"]
        if todo == "fail":
            self._logger.log(ILogger.Severity.ERROR, "no tactic")
        if todo == "no memory":
            self._logger.log(ILogger.Severity.ERROR, "Unexpected exception std::bad_alloc")
        if todo == "raise MemoryError":
            raise MemoryError
        if todo == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if todo == "crash":
            sys.stderr.write("terminate called: something broke\n")
            sys.stderr.flush()
            ctypes.string_at(0)
        if todo == "take long":
            Path(network.raw["pid file"]).write_text(str(os.getpid()))
            time.sleep(60)
        if todo in ("fail", "no memory"):
            return None
        asked = {
            "flags": config.flags,
            "profiles": config.profiles,
            "compatible": config.hardware_compatibility_level.name,
            "capabilities": getattr(config, "num_compute_capabilities", None),
        }
        return json.dumps(asked).encode()
