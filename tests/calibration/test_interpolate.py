"""Between the first stage and the second: the largest share within a budget, and what is stored for it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from medusa_deploy.calibration.training.finetune import Tuned  # noqa: E402
from medusa_deploy.calibration.training.interpolate import interpolate, share_within  # noqa: E402
from medusa_deploy.runtime.files.adapter_file import AdapterFiles, LoraShape, lora_config  # noqa: E402
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet  # noqa: E402


@given(st.floats(0.001, 0.5), st.floats(0.001, 3.0), st.floats(1.0, 3.0))
def test_the_largest_share_within_the_budget_is_found(budget: float, whole: float, power: float) -> None:
    asked = []

    def rise(share: float) -> float:
        asked.append(share)
        return whole * share**power

    share = share_within(budget, rise)
    best = min(1.0, (budget / whole) ** (1 / power))
    assert share == 0 or rise(share) <= budget * (1 + 1e-9)
    assert all(0 < tried <= 1 for tried in asked)
    if power > 1.5 and best > 0.1:
        assert share > 0.8 * best - 0.011, (share, best)


def test_quality_that_gets_better_keeps_everything() -> None:
    assert share_within(0.02, lambda share: -0.01 * share) == 1.0


def test_a_share_lies_between_both_stages() -> None:
    config = HeadConfig("medusa", 1, 1, 2, 3, "pruned")

    def heads(value: float) -> HeadSet:
        weight, bias = np.full((2, 2), value, np.float16), np.full(2, 2 * value, np.float16)
        return HeadSet(config, {"head.0.layer.0.weight": weight, "head.0.layer.0.bias": bias, "token_map": np.arange(3)})

    shape = LoraShape(4, 8.0, ("q_proj",))
    tuned = Tuned(heads(3.0), AdapterFiles(lora_config(shape), b"weights", "digest"), shape, [])
    found = interpolate(heads(1.0), tuned, 0.25)
    assert found.heads.tensors["head.0.layer.0.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert found.heads.tensors["head.0.layer.0.bias"].dtype == np.float16
    assert found.heads.tensors["token_map"].tolist() == [0, 1, 2]
    assert json.loads(found.adapter.config)["lora_alpha"] == found.shape.alpha == 2.0
    assert (found.adapter.weights, found.adapter.backbone) == (b"weights", "digest")
    assert math.isclose(interpolate(heads(1.0), tuned, 1.0).shape.alpha, 8.0)
