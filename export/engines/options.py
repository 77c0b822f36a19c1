"""Plans an engine before it is built: targets, profiles, precision, features, and a check that all of it can be built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.arguments import MAX_INTEGER, integers, settings, settle, strings
from ...runtime.errors import UsageError
from ...runtime.executors import step_io
from ...runtime.files.bundle import Bundle, sha256
from ...runtime.files.engine_record import OLDEST_TARGETS, Profile, Range
from ...runtime.files.manifest import Manifest
from ..quantise.engine_formats import DEFAULT_BLOCK
from ..quantise.w8a8 import DEFAULTS, PrecisionOptions
from .features import TIMING_CACHE, check_features, features_of
from .network import check_source, weights_bytes
from .tensorrt import TensorRT

_TREE_ROWS = (8, 16, 32, 64)
_BEST_COLUMNS = 512
_PERHAPS = (0, 1, 1)

_AXES = {
    step_io.TOKENS: "BN",
    step_io.POSITIONS: "BN",
    step_io.ANCESTORS: "BNN",
    step_io.FORCED: "B",
    step_io.WRITE_INDEX: "B",
    step_io.COLUMNS: "T",
    step_io.LOGIT_ROWS: "BR",
    step_io.DRAFT_SLOTS: "BN",
    step_io.HEAD_ROWS: "W",
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Says how engines are built. ``precision``: of the backbone's weights. ``quantised``: what else is in few bits, and how.

    ``rows``: step sizes with a profile of their own; None takes :func:`default_rows`. ``prefill``: largest number of prompt rows
    in a step; None takes the bundle's. ``features``: names in :mod:`.features`.
    """

    backend: str = "tensorrt-rtx"
    precision: str = "fp16"
    quantised: PrecisionOptions = DEFAULTS
    weights: str = "inside"
    rows: Sequence[int] | None = None
    prefill: int | None = None
    features: tuple[str, ...] = ()
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        settle(self, {"prefill": (1, MAX_INTEGER)})
        object.__setattr__(self, "quantised", settings("quantised", self.quantised, PrecisionOptions))
        object.__setattr__(self, "rows", None if self.rows is None else integers("rows", self.rows))
        object.__setattr__(self, "features", () if self.features is None else strings("features", self.features))

    @property
    def all_features(self) -> tuple[str, ...]:
        """Features that are asked for, by name or by another option."""
        return tuple(sorted({*self.features, *([TIMING_CACHE] if self.timing_cache is not None else [])}))


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Describes what a build would make. ``weights_bytes``: of one target's plans. ``available``: features of the backend.

    ``quantised``: differences from what the precision alone means; empty if there are none.
    """

    backend: str
    backend_version: str
    targets: tuple[str, ...]
    precision: str
    quantised: Mapping[str, object]
    weights: str
    features: tuple[str, ...]
    available: tuple[str, ...]
    profiles: tuple[Profile, ...]
    weights_bytes: int


def default_rows(manifest: Manifest) -> tuple[int, ...]:
    """Choose the step sizes with a profile: plain decoding, the bundle's own tree, and the usual sizes that the bundle allows."""
    return tuple(sorted({1, manifest.tree().rows, *(rows for rows in _TREE_ROWS if rows <= manifest.limits.max_rows)}))


def profiles_for(
    manifest: Manifest, rows: Sequence[int], prefill: int | None = None, precision: str = "fp16"
) -> tuple[Profile, ...]:
    """Make one profile for prefill (slot by slot, logits of the last row) and one for each number of rows.

    A step carries the rows of the step before, which may have had any of the sizes. A prefill carries none.

    Raises:
        UsageError: a number of rows that the bundle doesn't allow.
    """
    limits = manifest.limits
    sizes = sorted(set(rows))
    if not sizes or sizes[0] < 1 or sizes[-1] > limits.max_rows:
        raise UsageError(f"rows {list(rows)}, the bundle allows 1 to {limits.max_rows}", hint="export with a larger --max-rows")
    chunk = limits.prefill_chunk if prefill is None else prefill
    if not limits.prefill_chunk <= chunk <= limits.capacity:
        raise UsageError(
            f"prefill of {chunk} rows, the bundle's sessions ask for {limits.prefill_chunk}",
            hint=f"from {limits.prefill_chunk} to the capacity of {limits.capacity}",
        )
    columns = (1, min(_BEST_COLUMNS, limits.cache_rows), limits.cache_rows)
    slots = (1, 1, limits.batch)
    # Prefill has one slot. In few bits a profile with a fixed number would get a layout, and so a copy, of the weights.
    alone = (1, 1, 1) if precision == "fp16" else slots
    first = Profile("prefill", (1, chunk, chunk), (1, 1, 1), alone, columns, (1, 1, 1), _PERHAPS)
    steps = (Profile(f"rows-{n}", (n, n, n), (n, n, n), slots, columns, (1, n, sizes[-1]), _heads(n)) for n in sizes)
    return (first, *steps)


def _heads(rows: int) -> Range:
    """Rows of the heads: a plain step may do without, a tree is what they are for."""
    return _PERHAPS if rows == 1 else (1, 1, 1)


def check_targets(tensorrt: TensorRT, targets: Sequence[str], options: EngineOptions) -> None:
    """Refuse targets that the package can't build for, and features that it lacks.

    Raises:
        UsageError: a target or a feature won't do.
    """
    for target in targets:
        tensorrt.check_target(target, options.features)
        for precision in sorted(options.quantised.precisions(options.precision)):
            check_format(precision, target)
        check_features(options.backend, options.all_features, target)


def plan_for(bundle: Bundle, tensorrt: TensorRT, targets: Sequence[str], options: EngineOptions) -> EnginePlan:
    """Check everything that can be known before a build, and return what it would make.

    Raises:
        UsageError: the bundle, a target, a size, a precision or a feature won't do.
    """
    check_source(bundle, options.precision, options.weights, options.quantised)
    check_targets(tensorrt, targets, options)
    manifest = bundle.manifest
    return EnginePlan(
        tensorrt.backend,
        tensorrt.version,
        tuple(dict.fromkeys(targets)),
        options.precision,
        _facts(options.precision, options.quantised),
        options.weights,
        options.all_features,
        features_of(tensorrt.backend),
        profiles_for(
            manifest, default_rows(manifest) if options.rows is None else options.rows, options.prefill, options.precision
        ),
        0 if options.weights == "streamed" else weights_bytes(bundle, options.precision, options.quantised),
    )


def _facts(precision: str, options: PrecisionOptions) -> dict[str, object]:
    """Return options as records hold them: by their differences from what the precision alone means."""
    parts = {part: options.of_part(part, precision) for part in ("projection", "heads")}
    facts: dict[str, object] = {part: of for part, of in parts.items() if of != DEFAULTS.of_part(part, precision)}
    if precision == "int4":
        facts |= {"block": options.block or DEFAULT_BLOCK}
    if options.scales is not None:
        facts |= {"scales_sha256": sha256(options.scales)}
        if precision != "int4":
            facts |= {"keep": "auto" if options.keep is None else sorted(options.keep)}
    return facts


def step_axes(layers: int) -> dict[str, str]:
    """Name the axes of the step graph's inputs: a letter if an axis varies, a dot if it is fixed. Caches vary in B alone."""
    return _AXES | dict.fromkeys(step_io.carried_names(layers), "B.P")


def step_sizes(profile: Profile) -> dict[str, Range]:
    """Return the ranges of the step graph's axes in a profile."""
    fields = {"B": "slots", "N": "rows", "R": "logit_rows", "T": "columns", "P": "carried", "W": "head_rows"}
    return {axis: getattr(profile, field) for axis, field in fields.items()}


def check_format(precision: str, target: str) -> None:
    """Refuse a GPU that lacks the numbers of a precision. ``here`` is left to the builder.

    Raises:
        UsageError: the GPU is too old.
    """
    found, oldest = re.fullmatch(r"sm_(\d+)", target), OLDEST_TARGETS.get(precision, 0)
    if found and int(found[1]) < oldest:
        raise UsageError(
            f"{precision} needs sm_{oldest} or newer, and {target} has no such numbers",
            hint=f"build {target} with --precision {'int4 or int8' if int(found[1]) >= OLDEST_TARGETS['int4'] else 'int8'}",
        )
