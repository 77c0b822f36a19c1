"""Second moments are those of the rows that a prefill computes; too few rows or too large matrices are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from medusa_deploy.calibration.int8 import moments as module
from medusa_deploy.calibration.int8.collect import Calibrator
from medusa_deploy.calibration.int8.moments import Moments, collect_moments
from medusa_deploy.runtime.errors import CalibrationError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import VOCAB

TEXTS = [text for text in random_prompts(VOCAB, 256, 24, seed=7) if len(text) > 8]


class Rows:
    """Keeps the rows of prefills."""

    def __init__(self) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}

    def take(self, values: Any, _buffers: Any, *, prefill: bool) -> None:
        for name, value in values:
            if prefill:
                self.rows.setdefault(name, []).append(value.reshape(-1, value.shape[-1]).copy())


def test_moments_are_means_over_all_rows_of_all_texts(tiny_bundle: Path):
    calibrator = Calibrator(open_bundle(tiny_bundle), threads=1)
    found = collect_moments(calibrator, TEXTS)
    rows = Rows()
    for text in TEXTS:
        calibrator.watch(text, 1, rows)
    whole = max(len(np.concatenate(each)) for each in rows.rows.values())
    matmuls = [matmul for matmul in calibrator.matmuls if len(np.concatenate(rows.rows[matmul.activation])) == whole]
    assert len(matmuls) == 14, "all but the projection and the heads, which read one row of a prefill"
    assert set(found) == {matmul.weight for matmul in matmuls}
    for matmul in matmuls:
        seen = np.concatenate(rows.rows[matmul.activation]).astype(np.float64)
        [moments] = found[matmul.weight]
        np.testing.assert_allclose(moments, seen.T @ seen / len(seen), rtol=1e-3, atol=1e-4)


def test_wide_activations_keep_the_tiles_along_the_diagonal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TILE", 4)
    moments = Moments({"x": 10})
    rows = np.random.default_rng(0).normal(size=(7, 10)).astype(np.float32)
    moments.take([("x", rows[None])], np.arange(7), prefill=True)
    whole = rows.T @ rows
    assert [tile.shape for tile in moments.sums["x"]] == [(4, 4), (4, 4), (2, 2)]
    for at, tile in zip((0, 4, 8), moments.sums["x"], strict=True):
        np.testing.assert_allclose(tile, whole[at : at + 4, at : at + 4], rtol=1e-5)


def test_too_few_rows_are_an_error(tiny_bundle: Path):
    with pytest.raises(CalibrationError, match="GPTQ needs 256"):
        collect_moments(Calibrator(open_bundle(tiny_bundle), threads=1), TEXTS[:1])


def test_matrices_too_large_are_an_error_before_they_are_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    with pytest.raises(CalibrationError, match="second moments of 1 activations") as caught:
        Moments({"x": 1 << 10})
    assert "--rounding nearest" in caught.value.hint
