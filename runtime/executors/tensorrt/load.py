"""Loads a bundle's engine into a TensorRT executor: first the checks that need no plan, then the plan, then device memory."""

from __future__ import annotations

import weakref
from pathlib import PurePosixPath

from ...files.bundle import Bundle
from ...files.engine_record import EngineRecord
from .context import Contexts
from .cuda import Cuda, Device
from .engine import (
    Engine,
    check_aliases,
    check_tensors,
    choose_target,
    how_to_build,
    import_backend,
    open_plan,
    read_record,
)
from .executor import TrtExecutor
from .runtime_cache import RuntimeCache
from .weights import upload_weights


def load_executor(
    bundle: Bundle, backend: str, target: str | None, slots: int, *, device: int = 0, graphs: bool = True
) -> TrtExecutor:
    """Opens the engine of ``target`` (None: this GPU's) and allocates its memory. The memory is freed with the executor.

    Raises:
        MissingDependencyError: TensorRT or cuda-bindings isn't installed.
        DeviceError, DeviceMemoryError: there is no usable GPU, or it has too little free memory.
        BundleError, BundleSchemaError, BundleIntegrityError, EngineMismatchError, UsageError: the engine can't run here, or can't
            be trusted (:mod:`.engine`).
        EngineError: TensorRT refused the plan.
    """
    module = import_backend(backend)
    cuda = Cuda(device)
    try:
        facts = cuda.device()
        build = how_to_build(bundle, backend, module, facts)
        target = choose_target(bundle, target, facts, build)
        record = read_record(bundle, target, backend, str(module.__version__), facts, build)
        step = open_plan(module, bundle, target, record.plan, record.compression.get(record.plan))
        check_tensors(step, record.inputs, record.outputs, len(record.profiles))
        check_aliases(step, bundle.manifest.backbone.layers)
        stream = cuda.stream()
        weights = upload_weights(cuda, stream, bundle, record.weight_inputs)
        heads_plan, packed, chosen = record.heads_plan, record.compression.get(record.heads_plan), target

        def open_heads() -> Engine:
            return open_plan(module, bundle, chosen, heads_plan, packed)

        cache = _runtime_cache(bundle, target, record, facts)
        executor = TrtExecutor(
            cuda, stream, bundle.manifest, record, step, open_heads, slots, weights, cache=cache, graphs=graphs
        )
    except BaseException:
        cuda.close()
        raise
    weakref.finalize(executor, _close, cuda, executor.contexts)
    return executor


def _runtime_cache(bundle: Bundle, target: str, record: EngineRecord, device: Device) -> RuntimeCache | None:
    """Names the file for kernels beside the plan. An engine of the package tensorrt holds compiled kernels and needs none."""
    if record.backend != "tensorrt-rtx":
        return None
    name = bundle.manifest.engines[target]
    plan = f"{PurePosixPath(name).parent}/{record.plan}"
    key = {
        "plan": bundle.manifest.files[plan].sha256,
        "version": record.backend_version,
        "gpu": device.name,
        "target": device.target,
        "driver": str(device.driver),
    }
    return RuntimeCache(bundle.path(name).parent, key)


def _close(cuda: Cuda, contexts: Contexts) -> None:
    """Keeps what TensorRT-RTX has compiled, then frees everything."""
    try:
        contexts.save_cache()
    finally:
        cuda.close()
