"""Makes scales from observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ...runtime.errors import CalibrationError
from ...runtime.files.scales_file import LEVELS, ActivationScale, Layer, Scales, Smoothing
from .matmuls import Matmul, StepGraph
from .observations import Observations
from .observers import RangeObserver
from .ranges import Method, choose_range, clipped_share, relative_error, zeroed_share
from .takers import smoothable

FEWEST_ROWS = 128


class Source(Protocol):
    """A calibrator: its graph, and the matmuls that it watched."""

    @property
    def graph(self) -> StepGraph: ...

    @property
    def matmuls(self) -> Sequence[Matmul]: ...


def make_scales(
    calibrator: Source,
    seen: Observations,
    method: Method,
    settings: dict[str, object],
    smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None,
    weights: Mapping[tuple[str, int], np.ndarray] | None = None,
    *,
    steps: bool = True,
) -> Scales:
    """Make scales of all activations by ``method``, and of their weights by largest magnitudes.

    ``settings``: of the run that ``seen`` comes from. They become the provenance, with the counts of rows. ``weights``: known
    scales; None computes them. ``steps``: require that steps of a tree were seen.

    Raises:
        CalibrationError: fewer than 128 rows, no step after a prefill, or an activation that was never computed.
        RangeError: an activation or weight that no scale fits.
        QuantisationError: a weight holds NaN or infinity.
    """
    check_enough(seen, steps=steps)
    matmuls = calibrator.matmuls
    if weights is None:
        keys = dict.fromkeys((matmul.weight, matmul.axis) for matmul in matmuls)
        weights = {key: calibrator.graph.weight_scales(*key) for key in keys}
    return Scales(
        method.describe(),
        {matmul.name: Layer(matmul.activation, matmul.weight, matmul.axis) for matmul in matmuls},
        {name: _activation_scale(observer, method) for name, observer in seen.observers.items()},
        weights,
        {**settings, "prefill_rows": seen.prefill_rows, "tree_rows": seen.tree_rows},
        smoothing or {},
        {name: found.taker for name, found in smoothable(calibrator.graph).items() if name in (smoothing or {})},
    )


def check_rows(rows: int) -> None:
    """Refuse too few rows.

    Raises:
        CalibrationError: fewer than 128.
    """
    if rows < FEWEST_ROWS:
        raise CalibrationError(f"the data gave {rows} rows, scales need {FEWEST_ROWS}", hint="give more or longer prompts")


def check_enough(seen: Observations, *, steps: bool = True) -> None:
    """Refuse too little data.

    Raises:
        CalibrationError: see :func:`make_scales`.
    """
    check_rows(seen.prefill_rows + seen.tree_rows)
    if steps and not seen.tree_rows:
        raise CalibrationError(
            "every prompt ended at its first token: no step of a tree was seen", hint="give other prompts, or more new tokens"
        )
    never = [name for name, observer in seen.observers.items() if not observer.rows]
    if never:
        raise CalibrationError(
            f"the activation {never[0]} was never computed, nor {len(never) - 1} others", hint="give more prompts"
        )


def _activation_scale(observer: RangeObserver, method: Method) -> ActivationScale:
    limit = choose_range(observer, method)
    return ActivationScale(
        scale=limit / LEVELS,
        largest=observer.largest,
        rows=observer.rows,
        clipped=clipped_share(observer, limit),
        zeroed=zeroed_share(observer, limit),
        relative_error=relative_error(observer, limit),
        channel_maxima=observer.channel_maxima,
    )
