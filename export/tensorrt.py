"""What we ask of TensorRT, of either package: ``tensorrt_rtx`` (builds for any listed GPU, also without one) and ``tensorrt``.

Both are strongly typed: an ONNX graph says what is fp16 and what is int8, and the builder changes nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.engine_record import Range, TensorRecord
from ..runtime.errors import EngineError, MissingDependencyError, UsageError

_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
BACKENDS = tuple(_MODULES)
HERE = "here"
_NUMPY_NAMES = {"HALF": "float16", "FLOAT": "float32", "INT64": "int64", "INT32": "int32", "BOOL": "bool", "BF16": "bfloat16"}

Advance = Callable[[int, int, str], bool]
"""``(done, total, phase)`` of the builder's innermost phase; False stops the build."""


class TensorRT:
    """One of the two packages."""

    def __init__(self, backend: str) -> None:
        """Import it.

        Raises:
            UsageError: no such backend.
            MissingDependencyError: it isn't installed, or its libraries can't be loaded.
        """
        if backend not in _MODULES:
            raise UsageError(f"unknown backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
        try:
            self.module: Any = importlib.import_module(_MODULES[backend])
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"{backend} can't be imported: {error}", hint=f"install with: pip install 'medusa-deploy[{backend}]'"
            ) from None
        self.backend = backend
        self.version = str(self.module.__version__)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that it can build for: GPU architectures as ``sm_89``, and ``here`` for the GPU of this machine."""
        listed = [name for name in dir(getattr(self.module, "ComputeCapability", None)) if name.startswith("SM")]
        return (*sorted((f"sm_{name[2:]}" for name in listed), key=lambda name: int(name[3:])), HERE)

    def check_target(self, target: str) -> None:
        """Refuse what it can't build for.

        Raises:
            UsageError: with the targets that there are.
        """
        if target not in self.targets:
            raise UsageError(
                f"{self.backend} {self.version} can't build for {target!r}", hint=f"its targets: {', '.join(self.targets)}"
            )

    def parse(self, path: Path) -> ParsedGraph:
        """Read an ONNX file.

        Raises:
            EngineError: the parser refused it, and why.
        """
        return ParsedGraph(self, path)


class ParsedGraph:
    """A network ready to be built. Profiles are added in the order in which the engine will number them."""

    def __init__(self, tensorrt: TensorRT, path: Path) -> None:
        self._tensorrt = tensorrt
        module = tensorrt.module
        self._log = _log(module)
        self._builder = module.Builder(self._log)
        self._network = self._builder.create_network(0)
        self._parser = module.OnnxParser(self._network, self._log)  # owns the weights: lives as long as the network
        self._profiles: list[Any] = []
        if not self._parser.parse_from_file(str(path)):
            said = [self._parser.get_error(index).desc() for index in range(self._parser.num_errors)]
            raise EngineError(f"{tensorrt.backend} can't parse {path.name}: {'; '.join(said)[:500]}", hint=_REPORT)

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """Network inputs, in order."""
        return tuple(_tensor_record(self._network.get_input(index)) for index in range(self._network.num_inputs))

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """Network outputs, in order."""
        return tuple(_tensor_record(self._network.get_output(index)) for index in range(self._network.num_outputs))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the parser and the builder warned of, each line once."""
        return tuple(dict.fromkeys(self._log.warnings))

    def add_profile(self, shapes: Mapping[str, Sequence[Range]]) -> None:
        """Sizes of each axis of each input, as ranges."""
        profile = self._builder.create_optimization_profile()
        for name, axes in shapes.items():
            profile.set_shape(name, *([axis[which] for axis in axes] for which in range(3)))
        self._profiles.append(profile)

    def build(self, target: str, output: Path, advance: Advance = lambda _done, _total, _phase: True) -> None:
        """Compile for ``target`` into the file ``output``.

        Raises:
            EngineError: the builder failed or was stopped; its last error is in the message.
            OSError: the file system refused.
        """
        module = self._tensorrt.module
        config = self._builder.create_builder_config()
        if hasattr(module, "ComputeCapability"):
            config.num_compute_capabilities = 1
            name = "CURRENT" if target == HERE else target.upper().replace("_", "")
            config.set_compute_capability(getattr(module.ComputeCapability, name), 0)
        for profile in self._profiles:
            config.add_optimization_profile(profile)
        config.progress_monitor = monitor = _monitor(module, advance)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            if monitor.stopped:
                raise EngineError(f"the build for {target} was stopped", hint="start it again")
            said = self._log.errors[-1] if self._log.errors else "no reason given"
            raise EngineError(f"{self._tensorrt.backend} can't build for {target}: {said[:500]}", hint=_hint(said, target))
        output.write_bytes(memoryview(plan))


_REPORT = "report this with the output of: medusa-deploy doctor"


def _hint(said: str, target: str) -> str:
    if target == HERE:
        return "there may be no GPU here, or none that it supports: name a target such as sm_89"
    if "memory" in said.lower():
        return "use a machine with more memory, or fewer --rows"
    return _REPORT


def _tensor_record(tensor: Any) -> TensorRecord:
    dtype = str(tensor.dtype).rpartition(".")[2]
    return TensorRecord(str(tensor.name), _NUMPY_NAMES.get(dtype, dtype.lower()), tuple(int(size) for size in tensor.shape))


def _log(module: Any) -> Any:
    severity = module.ILogger.Severity

    class Log(module.ILogger):  # type: ignore[misc]
        """Keeps what goes wrong, so that a failed build says why."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif level == severity.WARNING:
                self.warnings.append(message)

    return Log()


def _monitor(module: Any, advance: Advance) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's steps on; called from its threads."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self._totals[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self._totals.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            self.stopped = self.stopped or not advance(step + 1, self._totals.get(phase, 0), phase)
            return not self.stopped

    return Monitor()
