"""How far layers look back is read from transformers' mask functions, whatever the config says."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_deploy.runtime.errors import UnsupportedArchitectureError

torch: Any = pytest.importorskip("torch")
windows: Any = pytest.importorskip("medusa_deploy.export.trace.windows")
masking: Any = pytest.importorskip("transformers.masking_utils")

CAPACITY = 64


@pytest.mark.parametrize(("window", "found"), [(1, 1), (2, 2), (16, 16), (63, 63), (64, None), (4096, None)])
def test_a_sliding_mask_has_its_window_unless_it_is_the_capacity(window: int, found: int | None) -> None:
    assert windows.window_of(masking.sliding_window_causal_mask_function(window), CAPACITY) == found


@pytest.mark.parametrize("capacity", [1, 2, 3, 64])
def test_a_causal_mask_has_no_window(capacity: int) -> None:
    assert windows.window_of(masking.causal_mask_function, capacity) is None


def test_chunks_as_long_as_the_capacity_are_no_windows() -> None:
    chunks = masking.chunked_causal_mask_function(CAPACITY, torch.zeros(1, dtype=torch.int64))
    assert windows.window_of(chunks, CAPACITY) is None


REFUSED = {
    "chunks": masking.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64)),
    "both directions": masking.bidirectional_mask_function,
    "a window in both directions": masking.sliding_window_bidirectional_mask_function(8),
    "nothing": lambda _batch, _head, row, column: (row < 0) & (column < 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_patterns_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="others than the latest ones"):
        windows.window_of(REFUSED[name], CAPACITY)
