"""Opens bundles on backends: one function for each. An engine's package is imported inside its function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from .errors import UsageError
from .files.manifest import cpu_twin, packed_twin

if TYPE_CHECKING:
    from .executors.executor import Executor
    from .executors.ort_base import OrtModel
    from .files.bundle import Bundle


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The arguments of :func:`.session.load` that backends read."""

    backend: str
    target: str | None = None
    slots: int = 1
    threads: int | None = None
    variant: str | None = None
    warm: bool | None = None

    def refuse(self, *names: str) -> None:
        """Refuses options that the backend doesn't take: none is ignored without a word.

        Raises:
            UsageError: one of the options ``names`` is given.
        """
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise UsageError(f"the backend {self.backend} takes no {' or '.join(given)}", hint="leave it out")


def _cpu(bundle: Bundle, options: LoadOptions) -> Executor:
    from .executors.ort import OrtExecutor

    options.refuse("target", "warm")
    manifest = bundle.manifest
    variant = options.variant or _cpu_variant(bundle)
    known = [name for name in manifest.variants if name in ("standard", "int8") or is_cpu(name)]
    if variant not in known:
        raise UsageError(f"the bundle has no variant {variant!r} for the CPU", hint=f"its variants: {', '.join(known)}")
    model = ort_model(bundle, options.slots, variant)
    _check_slots(options.slots, most_slots(bundle, "cpu", variant))
    return OrtExecutor(model, options.threads)


def most_slots(bundle: Bundle, backend: str, variant: str | None = None) -> int:
    """Returns how many slots a session on the bundle may have: as many as it was exported for, or its packed graphs take."""
    most, variant = bundle.manifest.limits.batch, variant or _cpu_variant(bundle)
    if backend != "cpu" or variant not in bundle.manifest.variants:
        return most
    return max(most, *ort_model(bundle, 1, variant).packed, 1)


def _cpu_variant(bundle: Bundle) -> str:
    """Returns the variant that is taken where none is named. A bundle that was exported in few bits has one."""
    variants = bundle.manifest.variants
    return next((name for name in ("cpu", "standard") if name in variants), next(iter(variants)))


def _check_slots(slots: int, most: int) -> None:
    if not 1 <= slots <= most:
        raise UsageError(f"{slots} slots, the bundle allows 1 to {most}", hint=f"export with --batch {max(slots, 1)}")


def is_cpu(variant: str) -> bool:
    """True for variants in the CPU provider's own operators: ``cpu``, and ``cpu-…``, which are quantised from it."""
    return variant == "cpu" or variant.startswith("cpu-")


def _cuda(bundle: Bundle, options: LoadOptions) -> Executor:
    from .executors.ort_cuda import OrtDeviceExecutor

    options.refuse("target", "threads", "warm")
    variant = options.variant or "standard"
    known = [name for name in bundle.manifest.variants if name == "standard" or name.startswith("cuda-")]
    if variant not in known:
        raise UsageError(
            f"the backend cuda runs {', '.join(known) or 'no graph of this bundle'}, not {variant!r}",
            hint="leave the variant out, or make one: medusa-deploy quantise BUNDLE --backend cuda",
        )
    _check_slots(options.slots, bundle.manifest.limits.batch)
    return OrtDeviceExecutor(ort_model(bundle, options.slots, variant))


def ort_model(bundle: Bundle, slots: int, variant: str) -> OrtModel:
    """Collects the paths and sizes that an executor of ONNX Runtime needs for one of the bundle's graphs."""
    from .executors import step_io
    from .executors.executor import CacheLayout
    from .executors.ort_base import OrtModel

    manifest = bundle.manifest
    backbone, heads = manifest.backbone, manifest.heads
    rows = manifest.limits.cache_rows
    cpu_heads = cpu_twin(manifest.heads_graph)
    graph = manifest.graph(variant)
    twins = {places: packed_twin(graph, places) for places in step_io.PACKED_SLOTS}
    folder = PurePosixPath(graph).parent.as_posix()
    contents = [f"{file} {record.sha256}" for file, record in manifest.files.items() if file.startswith(f"{folder}/")]
    return OrtModel(
        bundle.path(graph),
        bundle.path(cpu_heads if is_cpu(variant) and cpu_heads in manifest.files else manifest.heads_graph),
        CacheLayout(backbone.layers, slots, backbone.kv_heads, rows, backbone.head_dim, manifest.dtype),
        heads.num_heads,
        heads.top_k,
        backbone.hidden_size,
        backbone.vocab_size,
        {places: bundle.path(twin) for places, twin in twins.items() if is_cpu(variant) and twin in manifest.files},
        "\n".join([graph, *contents]),
    )


def _tensorrt(bundle: Bundle, options: LoadOptions) -> Executor:
    from .executors.tensorrt.load import load_executor

    options.refuse("threads", "variant")
    _check_slots(options.slots, bundle.manifest.limits.batch)
    executor = load_executor(bundle, options.backend, options.target, options.slots)
    if options.warm:
        from .executors.tensorrt.warm import warm

        warm(executor, {1, bundle.manifest.tree().rows})
    return executor


BACKENDS: dict[str, Callable[[Bundle, LoadOptions], Executor]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}
"""Name of a backend, as ``load(..., backend=)`` and ``--backend`` take it, to the function that opens a bundle on it."""
