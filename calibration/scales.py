"""Scales from observations."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.errors import CalibrationError
from ..runtime.scales_file import LEVELS, ActivationScale, Layer, Scales, Smoothing
from .collect import Calibrator
from .observations import Observations
from .observers import RangeObserver
from .ranges import Method, choose_range, clipped_share, relative_error, zeroed_share

FEWEST_ROWS = 128


def make_scales(
    calibrator: Calibrator,
    seen: Observations,
    method: Method,
    settings: dict[str, object],
    smoothing: Mapping[str, Mapping[str, Smoothing]] | None = None,
) -> Scales:
    """Scales of all activations that products read, by ``method``, and of their weights, by largest magnitudes.

    ``settings``: of the run that ``seen`` comes from; they become the provenance, with the counts of rows.

    Raises:
        CalibrationError: fewer than 128 rows, no step after a prefill, or an activation that was never computed.
        RangeError: an activation or weight that no scale fits.
        QuantisationError: a weight holds NaN or infinity.
    """
    check_enough(seen)
    products = calibrator.products
    weights = dict.fromkeys((product.weight, product.axis) for product in products)
    return Scales(
        method.describe(),
        {product.name: Layer(product.activation, product.weight, product.axis) for product in products},
        {name: _activation_scale(observer, method) for name, observer in seen.observers.items()},
        {key: calibrator.graph.weight_scales(*key) for key in weights},
        {**settings, "prefill_rows": seen.prefill_rows, "tree_rows": seen.tree_rows},
        smoothing or {},
    )


def check_enough(seen: Observations) -> None:
    """Refuse too little data.

    Raises:
        CalibrationError: see :func:`make_scales`.
    """
    rows = seen.prefill_rows + seen.tree_rows
    if rows < FEWEST_ROWS:
        raise CalibrationError(f"the data gave {rows} rows, scales need {FEWEST_ROWS}", hint="give more or longer prompts")
    if not seen.tree_rows:
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
