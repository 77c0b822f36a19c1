"""Calls TensorRT, either package: ``tensorrt_rtx`` (builds for any listed GPU, also without one) or ``tensorrt``.

Networks are strongly typed: an ONNX graph says what is fp16 and what is int8, and the builder changes nothing. The calls for
``tensorrt`` (10.9 and newer) are those of its Python API. They are tested against a stand-in, not yet against the package, whose
libraries need a vendor's index. :mod:`.features` lists what only one of the two has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.errors import EngineError, EngineMemoryError, UsageError
from ...runtime.executors.tensorrt.engine import HERE, MODULES, import_backend, listed_targets, numpy_name, trt_log
from ...runtime.files.engine_record import Range, TensorRecord
from .features import CROSS_BUILD, HARDWARE_COMPATIBLE, apply_features, has, is_compatible_target, save_timing_cache

BACKENDS = tuple(MODULES)
# TensorRT's messages when an allocation fails. The last is its compiler's.
_OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|memory allocation|CHECK\(p\) failed|MemoryError", re.IGNORECASE)
_REPORT = "report this with the output of: medusa-deploy doctor"

Monitor = Callable[[str, str | None, int, int], bool]
"""Hears ``(phase, parent, steps done, steps)``, done 0 when a phase starts; False stops the build."""


class TensorRT:
    """Wraps one of the two packages."""

    def __init__(self, backend: str) -> None:
        """Import it.

        Raises:
            UsageError: no such backend.
            MissingDependencyError: it isn't installed, or its libraries can't be loaded.
        """
        if backend not in MODULES:
            raise UsageError(f"unknown backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
        self.module: Any = import_backend(backend)
        self.backend = backend
        self.version = str(self.module.__version__)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that it can build for: GPU architectures such as ``sm_89``, and ``here`` for the GPU of this machine."""
        return (*(listed_targets(self.module) if has(self.backend, CROSS_BUILD) else ()), HERE)

    def check_target(self, target: str, features: Sequence[str] = ()) -> None:
        """Refuse a target that it can't build for.

        Raises:
            UsageError: the hint lists the targets.
        """
        if target in self.targets or (HARDWARE_COMPATIBLE in features and is_compatible_target(target)):
            return
        hint = f"its targets: {', '.join(self.targets)}"
        if has(self.backend, HARDWARE_COMPATIBLE):
            hint += "; with --hardware-compatible also sm_80 and newer"
        raise UsageError(f"{self.backend} {self.version} can't build for {target!r}", hint=hint)

    def parse(self, path: Path) -> ParsedGraph:
        """Read an ONNX file.

        Raises:
            EngineError: the parser refused it; the message names the node and the reason.
        """
        return ParsedGraph(self, path)


class ParsedGraph:
    """Holds a network that is ready to be built. The engine numbers profiles in the order in which they are added."""

    def __init__(self, tensorrt: TensorRT, path: Path) -> None:
        self._tensorrt = tensorrt
        module = tensorrt.module
        self._log = trt_log(module)
        self._builder = module.Builder(self._log)
        # Version 10 is strongly typed when asked; later ones always are, and may have no flag for it.
        typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = module.OnnxParser(self._network, self._log)  # owns the weights: lives as long as the network
        self._profiles: list[Any] = []
        if not self._parser.parse_from_file(str(path)):
            raise self._refused(path)

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """Network inputs, in order."""
        return tuple(_tensor_record(self._network.get_input(index)) for index in range(self._network.num_inputs))

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """Network outputs, in order."""
        return tuple(_tensor_record(self._network.get_output(index)) for index in range(self._network.num_outputs))

    @property
    def layers(self) -> int:
        """Layers of the network, before the builder fuses them."""
        return int(self._network.num_layers)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the parser and the builder, each line once."""
        return tuple(dict.fromkeys(self._log.warnings))

    def add_profile(self, shapes: Mapping[str, Sequence[Range]]) -> None:
        """Add a profile: the range of each axis of each input."""
        profile = self._builder.create_optimization_profile()
        for name, axes in shapes.items():
            profile.set_shape(name, *([axis[which] for axis in axes] for which in range(3)))
        self._profiles.append(profile)

    def build(
        self,
        target: str,
        output: Path,
        monitor: Monitor = lambda _phase, _parent, _done, _steps: True,
        *,
        features: Sequence[str] = (),
        timing_cache: Path | None = None,
    ) -> None:
        """Compile for ``target`` into the file ``output``.

        Raises:
            EngineError: the builder failed or was stopped; its last error is in the message.
            EngineMemoryError: it ran out of memory.
            OSError: the file system refused.
        """
        module = self._tensorrt.module
        config = self._builder.create_builder_config()
        if has(self._tensorrt.backend, CROSS_BUILD):
            config.num_compute_capabilities = 1
            name = "CURRENT" if target == HERE else target.upper().replace("_", "")
            config.set_compute_capability(getattr(module.ComputeCapability, name), 0)
        apply_features(module, config, features, timing_cache)
        for profile in self._profiles:
            config.add_optimization_profile(profile)
        config.progress_monitor = watcher = _watcher(module, monitor)
        if not self._compile(config, output):
            if watcher.stopped:
                raise EngineError(f"the build for {target} was stopped", hint="start it again")
            raise self._failed(target)
        if timing_cache is not None:
            save_timing_cache(config, timing_cache)

    def _compile(self, config: Any, output: Path) -> bool:
        if not hasattr(self._builder, "build_serialized_network_to_stream"):
            plan = self._builder.build_serialized_network(self._network, config)
            if plan is not None:
                output.write_bytes(memoryview(plan))
            return plan is not None
        # To a file directly: the plan never lies in memory as a whole.
        with output.open("wb") as file:
            writer = _writer(self._tensorrt.module, file)
            built = self._builder.build_serialized_network_to_stream(self._network, config, writer)
            if writer.error is not None:
                raise writer.error
        return bool(built)

    def _refused(self, path: Path) -> EngineError:
        said = []
        for index in range(self._parser.num_errors):
            error = self._parser.get_error(index)
            node = f"{error.node_operator()} {error.node_name()}: " if error.node_name() else ""
            said.append(node + str(error.desc()))
        reason = "; ".join(said) or "no reason given"
        message = f"{self._tensorrt.backend} {self._tensorrt.version} can't parse {path.name}: {reason[:800]}"
        return (
            EngineMemoryError(message, hint=_MORE_MEMORY) if _OUT_OF_MEMORY.search(reason) else EngineError(message, hint=_REPORT)
        )

    def _failed(self, target: str) -> EngineError:
        errors = self._log.errors or ["no reason given"]
        memory = [error for error in errors if _OUT_OF_MEMORY.search(error)]
        message = f"{self._tensorrt.backend} can't build for {target}: {(memory or errors)[-1][:500]}"
        if memory:
            return EngineMemoryError(message, hint=_MORE_MEMORY)
        if target == HERE:
            return EngineError(message, hint="there may be no GPU here, or none that it supports: name a target such as sm_89")
        return EngineError(message, hint=_REPORT)


_MORE_MEMORY = "use a machine with more memory, or fewer --rows"


def _tensor_record(tensor: Any) -> TensorRecord:
    return TensorRecord(str(tensor.name), numpy_name(tensor.dtype), tuple(int(size) for size in tensor.shape))


def _watcher(module: Any, monitor: Monitor) -> Any:
    class Watcher(module.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's steps on. Its threads call it."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int]] = {}
            self.stopped = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases[phase] = parent, steps
            self._tell(phase, 0)

        def phase_finish(self, phase: str) -> None:
            self._phases.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            return self._tell(phase, step + 1)

        def _tell(self, phase: str, done: int) -> bool:
            parent, steps = self._phases.get(phase, (None, 0))
            self.stopped = self.stopped or not monitor(phase, parent, done, steps)
            return not self.stopped

    return Watcher()


def _writer(module: Any, file: Any) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        """Writes to a file. Keeps an error, since none may pass through the builder."""

        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return int(file.write(data))
            except OSError as error:
                self.error = error
                return 0

    return Writer()
