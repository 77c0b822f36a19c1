"""Execution contexts of an engine, and the CUDA graphs captured from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DeviceError, EngineError, UsageError
from ...files.engine_record import EngineRecord
from .cuda import Cuda
from .engine import Engine
from .runtime_cache import RuntimeCache

PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Bindings:
    """``shapes`` of the inputs whose shape varies, and ``addresses`` of all tensors, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]


class Contexts:
    """One context for each profile. All share one block of scratch memory: on one stream they take turns.

    TensorRT wants to enqueue new shapes once before they are captured. A call whose shapes differ from the context's last ones is
    therefore enqueued as it is. A call with the same shapes is captured as a CUDA graph. Later calls with its key launch it.
    """

    def __init__(
        self, cuda: Cuda, stream: Any, engine: Engine, cache: RuntimeCache | None = None, *, graphs: bool = True
    ) -> None:
        """Allocates scratch memory for the largest profile, and creates the contexts.

        ``cache``: where TensorRT-RTX finds the kernels that it compiled for this engine before.

        Raises:
            DeviceMemoryError: the scratch memory doesn't fit on the device.
            EngineError: TensorRT made no context.
        """
        self._cuda, self._stream, self._engine = cuda, stream, engine
        self.graphs: dict[Hashable, Any] = {}
        self.captures = graphs
        plan = engine.plan
        self._names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        sizes = [int(plan.get_device_memory_size_for_profile_v2(index)) for index in range(plan.num_optimization_profiles)]
        self.scratch = cuda.allocate(max(*sizes, 1), "the engine's scratch memory")
        create, self._compiled = _context_maker(engine, cache)
        self.cache = cache
        self._contexts = [self._prepared(create(), profile) for profile in range(len(sizes))]
        self._enqueued: list[Mapping[str, tuple[int, ...]] | None] = [None] * len(sizes)

    def _prepared(self, context: Any, profile: int) -> Any:
        if context is None or not context.set_optimization_profile_async(profile, int(self._stream)):
            raise EngineError(f"TensorRT can't run profile {profile}: {_last(self._engine)}", hint="build the engine again")
        context.set_device_memory(self.scratch.address, self.scratch.nbytes)
        return context

    def save_cache(self) -> bool:
        """Writes the kernels that were compiled so far to the file of ``cache``. Returns False if there is nothing new."""
        return self.cache is not None and self._compiled is not None and self.cache.save(self._compiled)

    def enqueue(self, profile: int, key: Hashable | None, bindings: Callable[[], Bindings]) -> None:
        """Puts one call into the stream. ``key``: everything that ``bindings`` depends on; a call with None is never captured.

        Raises:
            EngineError: TensorRT refused the shapes or the call.
        """
        graph = self.graphs.get(key) if key is not None else None
        if graph is None:
            graph = self._first_time(profile, key, bindings())
        if graph is not None:
            self._cuda.launch(graph, self._stream)

    def _first_time(self, profile: int, key: Hashable | None, bindings: Bindings) -> Any:
        """Enqueues the call and returns None, or captures it and returns the graph for the caller to launch."""
        context = self._contexts[profile]
        self._bind(context, bindings)
        if key is not None and self.captures and self._enqueued[profile] == bindings.shapes and self._is_capturable(context):
            try:
                graph = self._cuda.capture(self._stream, lambda: self._execute(context))
            except (DeviceError, EngineError) as error:
                self.captures = False
                warnings.warn(f"no CUDA graphs: {error.message}", RuntimeWarning, stacklevel=2)
            else:
                self.graphs[key] = graph
                return graph
        self._execute(context)
        self._enqueued[profile] = bindings.shapes
        return None

    def _bind(self, context: Any, bindings: Bindings) -> None:
        for name, shape in bindings.shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"the engine takes no {name} of shape {shape}: {_last(self._engine)}", hint=_REBUILD)
        for name in self._names:
            if not context.set_tensor_address(name, bindings.addresses[name]):
                raise EngineError(f"the engine takes no address for {name}: {_last(self._engine)}", hint=_REBUILD)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise EngineError(f"TensorRT can't run the step: {_last(self._engine)}", hint=_REBUILD)

    def _is_capturable(self, context: Any) -> bool:
        """Asks TensorRT-RTX, which may still be compiling kernels. The package tensorrt can always be captured."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(int(self._stream)))


def profiles_by_rows(record: EngineRecord, slots: int) -> tuple[int, dict[int, int]]:
    """Returns the index of the prefill profile, and the index of each step profile by its number of rows, in ascending order.

    Raises:
        UsageError: the engine was built for fewer slots, or lacks such profiles.
    """
    prefill = [index for index, profile in enumerate(record.profiles) if profile.name == PREFILL]
    steps = {
        profile.rows[2]: index
        for index, profile in enumerate(record.profiles)
        if profile.name != PREFILL and profile.slots[0] <= slots <= profile.slots[2]
    }
    if not prefill or not steps:
        most = max((profile.slots[2] for profile in record.profiles), default=0)
        raise UsageError(
            f"{slots} slots, the engine takes up to {most}", hint="load with fewer slots, or export with --batch and build again"
        )
    return prefill[0], dict(sorted(steps.items()))


def smallest_profile(profiles: Mapping[int, int], rows: int) -> int:
    """Returns the smallest number of rows ≥ ``rows`` that has a profile.

    Raises:
        UsageError: there is none.
    """
    fitting = [size for size in profiles if size >= rows]
    if not fitting:
        raise UsageError(
            f"a step of {rows} rows, the engine takes up to {max(profiles)}",
            hint=f"use fewer rows, or build it again with --rows {','.join(map(str, [*profiles, rows]))}",
        )
    return min(fitting)


_REBUILD = "build the engine again, with the rows and the prefill that the session needs"


def _last(engine: Engine) -> str:
    return str(engine.log.errors[-1])[:300] if engine.log.errors else "no reason given"


def _context_maker(engine: Engine, cache: RuntimeCache | None) -> tuple[Callable[[], Any], Any]:
    """Returns a function that creates contexts without scratch memory of their own, and TensorRT-RTX's cache of kernels.

    In TensorRT-RTX these contexts share compiled kernels, and its own graph strategy is off: :class:`Contexts` captures.
    """
    module, plan = engine.module, engine.plan
    strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(module, "CudaGraphStrategy"):
        return (lambda: plan.create_execution_context(strategy)), None
    config = plan.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
    # A captured graph keeps the kernels that it was captured with: compile them for its shapes before.
    config.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
    compiled = config.create_runtime_cache()
    if cache is not None:
        cache.fill(compiled)
    config.set_runtime_cache(compiled)
    return (lambda: plan.create_execution_context(config)), compiled
