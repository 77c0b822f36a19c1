"""The comparison with the torch module: every row counts, and one run of the reference serves a whole path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medusa_deploy.export.proof.check import Observed, compare
from medusa_deploy.runtime.errors import ExportMismatchError, NumericsError

VOCABULARY = 7
CONTEXTS = ([1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [1, 2, 4, 6])


def _logits(tokens: np.ndarray) -> np.ndarray:
    """After each token, of all tokens up to it: [n, V]."""
    seen = np.cumsum(tokens * (1 + np.arange(len(tokens))))
    return np.sin(np.outer(seen, 1 + np.arange(VOCABULARY))).astype(np.float32)


def _compared(change: Any = lambda rows: None, greedy: int | None = None) -> tuple[Any, list[list[int]]]:
    rows = [(np.array(context), _logits(np.array(context))[-1].copy()) for context in CONTEXTS]
    change(rows)
    asked: list[list[int]] = []

    def reference(tokens: np.ndarray) -> np.ndarray:
        asked.append(tokens.tolist())
        return _logits(tokens)

    module = SimpleNamespace(
        get_decoder=lambda: lambda **_: SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 1)),
        get_input_embeddings=lambda: lambda _: torch.zeros(1, 1, 1),
    )
    backbone: Any = SimpleNamespace(dtype=torch.float32, module=module)
    heads: Any = lambda _state, _embedding: (torch.zeros(1, 1, 1, dtype=torch.int64), None)  # noqa: E731
    pair = (np.array([1]), 0, np.zeros((1, 1), np.int64))
    chosen = int(rows[0][1].argmax()) if greedy is None else greedy
    return compare(Observed(rows, [pair], chosen), reference, backbone, heads), asked


def test_one_run_of_the_reference_serves_all_rows_of_a_path() -> None:
    report, asked = _compared()
    assert asked == [[1, 2, 3, 5], [1, 2, 4, 6]]
    assert (report.rows, report.max_logit_error, report.argmax_agreement) == (len(CONTEXTS), 0, 1)


@pytest.mark.parametrize("row", range(len(CONTEXTS)))
def test_a_wrong_row_is_found_wherever_it_is(row: int) -> None:
    def change(rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        rows[row][1][3] += 0.5

    with pytest.raises(ExportMismatchError, match="differ by 0.5"):
        _compared(change)


@pytest.mark.parametrize("row", range(len(CONTEXTS)))
def test_a_row_without_numbers_is_found(row: int) -> None:
    def change(rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        rows[row][1][0] = np.nan

    with pytest.raises(NumericsError):
        _compared(change)


def test_a_greedy_choice_that_the_logits_deny_is_found() -> None:
    with pytest.raises(ExportMismatchError, match="chooses token"):
        _compared(greedy=int(_logits(np.array(CONTEXTS[0]))[-1].argmin()))
