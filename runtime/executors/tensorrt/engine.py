"""Opens a TensorRT engine of a bundle: first every check that needs no plan, then the plan, then the checks that need it.

A plan is executable code: nothing deserialises bytes whose sha256 isn't the manifest's.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ...errors import BundleError, BundleIntegrityError, EngineError, EngineMismatchError, MissingDependencyError, UsageError
from ...files.bundle import Bundle
from ...files.engine_record import EngineRecord, TensorRecord, check_record_size, parse_engine_record
from ...files.plan_file import Compression, plan_bytes
from .. import step_io
from .cuda import Device

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backend to the Python package that it imports."""
HERE = "here"
"""Name of the target that means the GPU of the building machine."""
VARIANT = "device"
_NUMPY_NAMES = {"HALF": "float16", "FLOAT": "float32", "INT64": "int64", "INT32": "int32", "BOOL": "bool", "BF16": "bfloat16"}
_NUMPY_NAMES["FP8"] = "float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class Engine:
    """A deserialised plan. ``log`` keeps TensorRT's messages. ``runtime`` must live as long as the engine."""

    module: Any
    runtime: Any
    log: Any
    plan: Any


def import_backend(backend: str) -> Any:
    """Imports the Python package of ``tensorrt-rtx`` or ``tensorrt``.

    Raises:
        MissingDependencyError: the package isn't installed, or its libraries can't be loaded.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{backend} can't be imported: {error}", hint=f"install it with: pip install 'medusa-deploy[{backend}]'"
        ) from None


def listed_targets(module: Any) -> tuple[str, ...]:
    """Returns the GPU architectures that ``tensorrt_rtx`` names, such as ``sm_89``. It builds for these only."""
    names = [name for name in dir(getattr(module, "ComputeCapability", None)) if re.fullmatch(r"SM\d+", name)]
    return tuple(f"sm_{number}" for number in sorted(int(name[2:]) for name in names))


def how_to_build(bundle: Bundle, backend: str, module: Any, device: Device) -> str:
    """Returns a hint: the command that builds an engine for this GPU. ``tensorrt`` builds for the machine's own GPU only."""
    command = f"medusa-deploy build {bundle.folder} --backend"
    full = f"{command} tensorrt --target {HERE}"
    if backend == "tensorrt":
        return f"build one with: {full}"
    listed = listed_targets(module)
    if listed and device.target not in listed:
        return (
            f"{backend} {module.__version__} builds for {', '.join(listed)} only: "
            f"use the backend cuda, or the backend tensorrt after: {full}"
        )
    return f"build one with: {command} {backend} --target {device.target}"


def choose_target(bundle: Bundle, target: str | None, device: Device, build: str) -> str:
    """Returns the target of the engine to run: ``target`` if given, else this GPU's architecture, else ``here``.

    ``build``: the hint of :func:`how_to_build`.

    Raises:
        BundleError: the bundle has no such engine.
        EngineMismatchError: the bundle has engines, and none is for this GPU.
    """
    engines = bundle.manifest.engines
    if not engines:
        raise BundleError("the bundle has no engines", hint=build)
    if target is not None and target not in engines:
        raise BundleError(f"the bundle has no engine for {target!r}, it has {', '.join(sorted(engines))}", hint=build)
    if target is None:
        target = next((name for name in (device.target, HERE) if name in engines), None)
    if target is None:
        raise EngineMismatchError(f"this GPU is {device.target}, the bundle's engines are for {', '.join(engines)}", hint=build)
    return target


def read_record(bundle: Bundle, target: str, backend: str, version: str, device: Device, build: str) -> EngineRecord:
    """Reads the record of ``target``'s engine and checks it against the package, the GPU and the bundle's graph. Opens no plan.

    ``build``: the hint of :func:`how_to_build`.

    Raises:
        BundleIntegrityError: the record's bytes aren't the manifest's.
        BundleSchemaError: the record can't be read.
        EngineMismatchError: the engine was built by another version, for another GPU, or from another graph.
        UsageError: another backend built the engine.
    """
    name = bundle.manifest.engines[target]
    check_record_size(name, bundle.manifest.files[name].size)
    record = parse_engine_record(checked_bytes(bundle, name))
    where = HERE if backend == "tensorrt" else target
    again = f"build it again: medusa-deploy build {bundle.folder} --target {where} --backend {backend} --force"
    if record.backend != backend:
        raise UsageError(
            f"the engine for {target} was built by {record.backend}, not by {backend}", hint=f"use --backend {record.backend}"
        )
    if record.backend_version != version:
        raise EngineMismatchError(
            f"the engine for {target} was built by {backend} {record.backend_version}; this process has {version}",
            hint=f"{again}, or install {backend} {record.backend_version}",
        )
    if record.target not in (HERE, device.target):
        mine = f"use --target {device.target}, or name no target" if device.target in bundle.manifest.engines else build
        hint = again if target == device.target else mine
        raise EngineMismatchError(f"the engine is for {record.target}; this GPU is {device.target}", hint=hint)
    variant = bundle.manifest.variants.get(VARIANT)
    if variant is None or record.graph_sha256 != bundle.manifest.files[variant].sha256:
        raise EngineMismatchError(f"the engine for {target} was built from another graph than the bundle's", hint=again)
    return record


def checked_bytes(bundle: Bundle, name: str) -> bytes:
    """Reads a file of the bundle and checks its hash. Returns the bytes that were hashed: the file can't be swapped in between.

    Raises:
        BundleIntegrityError: the file is missing, or its sha256 isn't the manifest's.
    """
    entry = bundle.manifest.files.get(name)
    if entry is None:
        raise BundleIntegrityError(f"{name} isn't among the manifest's files", hint="don't use this bundle")
    data = bundle.path(name).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise BundleIntegrityError(
            f"{name} has sha256 {digest[:16]}…, the manifest says {entry.sha256[:16]}…",
            hint="the file was changed or damaged: build the engine again",
        )
    return data


def open_plan(module: Any, bundle: Bundle, target: str, plan: str, compression: Compression | None = None) -> Engine:
    """Checks the hash of a plan's file, unpacks the file if it has a ``compression``, and deserialises the plan.

    Raises:
        BundleIntegrityError: the bytes aren't the ones that were built.
        EngineError: TensorRT refused the plan.
    """
    folder = PurePosixPath(bundle.manifest.engines[target]).parent
    data = plan_bytes(plan, checked_bytes(bundle, str(folder / plan)), compression)
    log = trt_log(module)
    runtime = module.Runtime(log)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        said = log.errors[-1] if log.errors else "no reason given"
        raise EngineError(f"TensorRT can't load {plan} for {target}: {said[:300]}", hint="build the engine again on this machine")
    return Engine(module, runtime, log, engine)


def check_tensors(engine: Engine, inputs: Sequence[TensorRecord], outputs: Sequence[TensorRecord], profiles: int) -> None:
    """Checks that the engine's inputs, outputs and number of profiles are the record's, and that all tensors lie on the device.

    Raises:
        EngineMismatchError: they differ (the message says where), or the engine wants a value on the host.
    """
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {"INPUT": {}, "OUTPUT": {}}
    plan = engine.plan
    for index in range(plan.num_io_tensors):
        name = plan.get_tensor_name(index)
        mode = str(plan.get_tensor_mode(name)).rpartition(".")[2]
        dtype = numpy_name(plan.get_tensor_dtype(name))
        shape = tuple(int(size) for size in plan.get_tensor_shape(name))
        if str(plan.get_tensor_location(name)).endswith("HOST"):
            raise EngineMismatchError(f"the engine wants {name} on the host, in every step", hint="report this")
        found[mode][name] = (dtype, shape)
    for mode, records in (("INPUT", inputs), ("OUTPUT", outputs)):
        expected = {record.name: (record.dtype, record.shape) for record in records}
        different = sorted(name for name in expected | found[mode] if expected.get(name) != found[mode].get(name))
        if different:
            name = different[0]
            raise EngineMismatchError(
                f"{len(different)} {mode.lower()}s differ from the engine's record, such as {name}: the plan has "
                f"{found[mode].get(name)}, the record {expected.get(name)}",
                hint="build the engine again",
            )
    if plan.num_optimization_profiles != profiles:
        raise EngineMismatchError(
            f"the plan has {plan.num_optimization_profiles} profiles, its record {profiles}", hint="build the engine again"
        )


def check_aliases(engine: Engine, layers: int) -> None:
    """Checks that the engine updates its caches in place: each output must be an alias of its input.

    Raises:
        EngineMismatchError: the engine would copy a cache, and the copy would be lost.
    """
    for past, present in zip(step_io.past_names(layers), step_io.present_names(layers), strict=True):
        alias = engine.plan.get_aliased_input_tensor(present)
        if alias != past:
            raise EngineMismatchError(
                f"the engine's output {present} shares memory with {alias or 'no input'}, not with {past}",
                hint="build the engine again, and report this if it stays",
            )


def numpy_name(dtype: Any) -> str:
    """Returns numpy's name of a ``DataType`` of either package. A type that numpy lacks keeps its own name in small letters."""
    name = str(dtype).rpartition(".")[2]
    return _NUMPY_NAMES.get(name, name.lower())


def trt_log(module: Any) -> Any:
    """Creates a TensorRT logger. Its base class comes from the package, so its class is made here.

    The logger must live as long as the objects that it was given to.
    """
    severity = module.ILogger.Severity

    class Log(module.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings: the message of a refusal quotes the last error."""

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
