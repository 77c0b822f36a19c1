"""Finds where in the backbone one variant begins to differ: compares the hidden states behind every layer, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ...runtime.session import Session
from ..environment import variant

_MOST_POSITIONS = 512

States = list[np.ndarray | None]


def layer_errors(
    a: Session,
    b: Session,
    texts: Sequence[Sequence[int]],
    threads: int | None = None,
    progress: Callable[[int, str], object] = lambda _done, _note: None,
) -> dict[str, Any]:
    """Errors of every layer's output in ``b`` against ``a``, over the first 512 positions of the texts.

    ``relative_rms`` is the root of the summed squared differences over that of the summed squares. A few positions, such as the
    first, have states a hundred times as large as the others and decide it. ``median`` stands beside it: the median of the
    positions' own relative errors. Both are None where a layer's tensor isn't found, or is of another size.

    Both graphs are loaded anew with their layers as outputs, one after the other. ``progress(done, note)`` follows the two.

    Raises:
        MissingDependencyError: onnx isn't installed.
    """
    cut, left = [], _MOST_POSITIONS
    for text in texts:
        if left:
            cut.append(list(text[:left]))
            left -= len(cut[-1])
    reference = _states(a, cut, threads)
    progress(1, "A")
    other = _states(b, cut, threads)
    progress(2, "B")
    found = [_errors(one, two) for one, two in zip_longest(reference, other)]
    return {
        "positions": sum(map(len, cut)),
        "relative_rms": [None if each is None else each[0] for each in found],
        "median": [None if each is None else each[1] for each in found],
        "not_comparable": [layer for layer, each in enumerate(found) if each is None],
    }


def _states(session: Session, texts: Sequence[list[int]], threads: int | None) -> States:
    """Hidden states behind each layer, over all texts, float32 [n, H]."""
    from ...calibration.int8.layer_states import LayerStates

    name = variant(session)
    assert name is not None, "only the CPU's sessions are compared"
    graph = LayerStates(session.bundle, name, threads)
    by_text = [graph.states(text) for text in texts]
    return [_joined(parts) for parts in zip(*by_text, strict=True)]


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _errors(reference: np.ndarray | None, other: np.ndarray | None) -> tuple[float, float] | None:
    if reference is None or other is None or reference.shape != other.shape:
        return None
    difference, size = (np.square(each, dtype=np.float64).sum(1) for each in (other - reference, reference))
    rows = np.sqrt(difference / np.maximum(size, np.finfo(np.float64).tiny))
    return float(np.sqrt(difference.sum() / max(size.sum(), np.finfo(np.float64).tiny))), float(np.median(rows))
