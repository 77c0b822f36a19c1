"""Plans a deployment: the bytes of a backbone with heads on a GPU, the limits that fit, bounds of speed, commands to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...runtime.arguments import MAX_INTEGER, integer, integers, number, optional_path
from ...runtime.errors import HeadsMismatchError, UsageError
from ...runtime.files.engine_record import OLDEST_TARGETS
from ...runtime.files.heads import HeadConfig, HeadKind, Projection
from .advice import commands_for, notes_for, suggestions_for
from .capacity import PRECISIONS, Footprint, Heads, Limits, cache_bytes_per_token, footprint, heads_of
from .expected import Expected, expected_speed, heads_config, is_heads_folder
from .gpus import Gpu, find_gpu
from .source import Source, source_of_bundle, source_of_model, source_of_size
from .step_estimate import HeadsEstimate, StepEstimate, compare_heads, estimate_step

GIB = 1 << 30
_CAPACITY_STEP = 64
_MOST_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Fit:
    """Limits that fit on a GPU. ``left``: bytes beyond the plan, negative where the GPU is too small.

    ``positions``: tokens that the model attends to. ``largest_capacity``: for the plan's batch, 0 where none fits.
    ``largest_batches``: pairs of capacity and slots.
    """

    gpu: Gpu
    left: int
    positions: int
    largest_capacity: int
    largest_batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """Sizes in bytes, and bounds of time from published figures.

    ``rows``: sizes of a step, each with a profile. ``context``: tokens in each slot of the estimated steps. ``plan_bytes``: size
    of an engine's file, at least and at most. ``totals``: bytes by precision. ``fit``, ``plain`` and ``steps`` exist only
    where a GPU was given, ``expected`` only with a report of step times.
    """

    name: str
    parameters: int
    precision: str
    limits: Limits
    rows: tuple[int, ...]
    heads: HeadConfig
    context: int
    bytes: Footprint
    total: int
    cache_bytes_per_token: int
    cache_bytes_per_slot: int
    plan_bytes: tuple[int, int]
    heads_estimates: tuple[HeadsEstimate, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    fit: Fit | None = None
    plain: StepEstimate | None = None
    totals: Mapping[str, int] = field(default_factory=dict)
    steps: tuple[StepEstimate, ...] = ()
    suggestions: tuple[str, ...] = ()
    expected: tuple[Expected, ...] = ()

    @property
    def fits(self) -> bool:
        """True unless a given GPU is too small."""
        return self.fit is None or self.fit.left >= 0


def plan_deployment(
    *,
    size: str | None = None,
    model: Path | str | None = None,
    bundle: Path | str | None = None,
    gpu: str | None = None,
    precision: str = "fp16",
    capacity: int | None = None,
    batch: int | None = None,
    rows: Sequence[int] | None = None,
    heads: str | None = None,
    num_heads: int = 4,
    head_kind: HeadKind = "medusa",
    context: int | None = None,
    acceptance: float | None = None,
    reserve: int = GIB,
    bench: Path | str | None = None,
) -> DeploymentPlan:
    """Plan for one of ``size`` (a preset), ``model`` (a folder) or ``bundle``; without ``gpu``, bytes only.

    ``heads``: ``own``, ``shared`` or ``pruned:TOKENS`` (default: the bundle's, else ``shared``), or a folder that ``train``
    wrote. Then ``bench``, a report of ``bench --sweep``, adds the speed-up to expect from them on that machine. ``context``:
    tokens in each slot of the estimated steps (default: half the capacity). ``acceptance``: a measured mean acceptance length;
    without it the plan names no Medusa speed. ``reserve``: bytes of the GPU left to others, an assumption.

    Raises:
        UsageError: an unknown size, GPU, precision or form of heads, a number out of range, or a report without step times.
        HeadsError, HeadsMismatchError: the folder holds no heads that ``train`` wrote, or those of another model.
        CheckpointError, UnsupportedArchitectureError, BundleError, MissingDependencyError: the model or bundle can't be read.
    """
    any_integer = -MAX_INTEGER
    capacity, batch = integer("capacity", capacity, None, any_integer), integer("batch", batch, None, any_integer)
    num_heads, context = integer("num_heads", num_heads, 4, any_integer), integer("context", context, None, any_integer)
    rows, reserve = None if rows is None else integers("rows", rows, any_integer), integer("reserve", reserve, GIB, low=0)
    acceptance, precision = number("acceptance", acceptance, None), "fp16" if precision is None else precision
    found = None if gpu is None else find_gpu(gpu)
    source = _source(size, model, bundle)
    bench = optional_path("bench", bench)
    if bench is not None and not is_heads_folder(heads):
        raise UsageError("step times alone say nothing of heads", hint="give the folder that train wrote as --heads")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    if found is not None and int(found.target.removeprefix("sm_")) < OLDEST_TARGETS.get(precision, 0):
        raise UsageError(
            f"{precision} needs sm_{OLDEST_TARGETS[precision]} or newer, and {found.name} is {found.target}", hint="take int8"
        )
    built = heads_of(_head_config(source, heads, num_heads, head_kind))
    steps = tuple(sorted({1, *(source.rows if rows is None else rows)}))
    limits = _limits(source, capacity, batch, steps)
    context = limits.capacity // 2 if context is None else context
    if not 0 <= context <= limits.capacity:
        raise UsageError(f"a context of {context} tokens, the capacity is {limits.capacity}", hint="from 0 to the capacity")
    most = built.config.num_heads + 1
    if acceptance is not None and not 1 <= acceptance <= most:
        raise UsageError(f"a mean acceptance length of {acceptance}", hint=f"with {most - 1} heads it lies between 1 and {most}")
    taken = footprint(source.backbone, built, precision, limits, len(steps) + 1, reserve)
    weights = taken.backbone + taken.heads if taken.weights == "inside" else 0
    plan = DeploymentPlan(
        name=source.name,
        parameters=source.backbone.parameters,
        precision=precision,
        limits=limits,
        rows=steps,
        heads=built.config,
        context=context,
        bytes=taken,
        total=taken.total,
        cache_bytes_per_token=cache_bytes_per_token(source.backbone.shape),
        cache_bytes_per_slot=taken.cache // limits.batch,
        plan_bytes=(weights, weights + taken.engine),
        heads_estimates=compare_heads(
            source.backbone, built.config, found, precision=precision, rows=steps[-1], batch=limits.batch, context=context
        ),
        commands=commands_for(source, precision, limits, steps, taken.weights, found),
        notes=notes_for(found, taken),
        totals={
            each: footprint(source.backbone, built, each, limits, len(steps) + 1, reserve).total for each in PRECISIONS
        },
        expected=() if bench is None else expected_speed(str(heads), bench),
    )
    return plan if found is None else _on_gpu(plan, source, built, found, acceptance)


def _source(size: str | None, model: Path | str | None, bundle: Path | str | None) -> Source:
    given = [value for value in (size, model, bundle) if value is not None]
    if len(given) != 1:
        raise UsageError(f"{len(given)} of size, model and bundle are given", hint="give exactly one")
    if size is not None:
        return source_of_size(size)
    return source_of_model(Path(model)) if model is not None else source_of_bundle(Path(str(bundle)))


def _head_config(source: Source, form: str | None, num_heads: int, kind: HeadKind) -> HeadConfig:
    shape = source.backbone.shape
    if form is None and source.heads is not None:
        return source.heads
    if form is not None and is_heads_folder(form):
        config = heads_config(form)
        if config.hidden_size != shape.hidden_size:
            raise HeadsMismatchError(
                f"the heads have the hidden size {config.hidden_size}, the backbone {shape.hidden_size}",
                hint="give the model that they were trained for",
            )
        return config
    name, _, tokens = (form or "shared").partition(":")
    forms: dict[str, Projection] = {"own": "own", "shared": "shared", "pruned": "pruned"}
    if name not in forms or (name == "pruned") != bool(tokens):
        raise UsageError(f"unknown heads {form!r}", hint="own, shared, or pruned:TOKENS such as pruned:8192")
    if num_heads < 1 or (tokens and not (tokens.isdecimal() and 1 <= int(tokens) <= shape.vocab_size)):
        asked = f"{num_heads} heads over {tokens or shape.vocab_size} tokens"
        raise UsageError(asked, hint=f"1 head or more, up to {shape.vocab_size} tokens")
    return HeadConfig(kind, num_heads, 1, shape.hidden_size, int(tokens or shape.vocab_size), forms[name])


def _limits(source: Source, capacity: int | None, batch: int | None, rows: tuple[int, ...]) -> Limits:
    largest = source.backbone.shape.max_position
    if min(rows[0], 1 if batch is None else batch, 1 if capacity is None else capacity) < 1:
        raise UsageError("rows, batch and capacity must be at least 1")
    if source.kind != "bundle" and capacity is not None and capacity > largest:
        raise UsageError(f"a capacity of {capacity} tokens, the model attends to {largest}", hint=f"--capacity {largest} or less")
    limits = source.limits.at(capacity, batch)
    return limits if source.kind == "bundle" else replace(limits, max_rows=rows[-1])


def _on_gpu(plan: DeploymentPlan, source: Source, heads: Heads, gpu: Gpu, acceptance: float | None) -> DeploymentPlan:
    limits = plan.limits

    def total(candidate: Limits) -> int:
        profiles = len(plan.rows) + 1
        return footprint(source.backbone, heads, plan.precision, candidate, profiles, plan.bytes.reserve).total

    def fitting_batch(capacity: int) -> int:
        return _largest(lambda batch: total(limits.at(capacity, batch)) <= gpu.memory_bytes, _MOST_SLOTS)

    def step(rows: int, heads: Heads | None) -> StepEstimate:
        return estimate_step(
            source.backbone, heads, gpu, precision=plan.precision, rows=rows, batch=limits.batch, context=plan.context
        )

    plain = step(1, None)
    steps = []
    for rows in plan.rows[1:]:
        estimate = step(rows, heads)
        speed = None if acceptance is None else limits.batch * acceptance / estimate.seconds
        steps.append(replace(estimate, ratio=estimate.seconds / plain.seconds, tokens_per_second=speed))
    most = source.backbone.shape.max_position
    capacities = sorted({limits.capacity, *(n for n in (1024, 2048, 4096, 8192, 16384) if n <= most)})
    fit = Fit(
        gpu,
        gpu.memory_bytes - plan.total,
        most,
        _CAPACITY_STEP * _largest(lambda n: total(limits.at(n * _CAPACITY_STEP)) <= gpu.memory_bytes, most // _CAPACITY_STEP),
        tuple((capacity, batch) for capacity in capacities if (batch := fitting_batch(capacity))),
    )
    return replace(
        plan,
        fit=fit,
        plain=replace(plain, tokens_per_second=limits.batch / plain.seconds),
        steps=tuple(steps),
        suggestions=() if fit.left >= 0 else suggestions_for(source, heads, plan.precision, limits, plan.bytes, plan.rows, gpu),
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Find the largest number up to ``most`` that fits, 0 if none does. Every number below one that fits must fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
