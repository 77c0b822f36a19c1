"""What is recommended is the fastest variant that keeps the budget; the figures are of runs that took place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")

from medusa_deploy.runtime.session import load
from medusa_deploy.tools.making.variant import quantise
from medusa_deploy.tools.measure import recommend as module
from medusa_deploy.tools.measure.timed_run import TimedRun
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import VOCAB

PROMPTS = random_prompts(VOCAB, 256, 2, seed=4)
SECONDS = {("cpu", 1): 0.04, ("cpu", None): 0.03, ("cpu-int8", 1): 0.02, ("cpu-int8", None): 0.01}


@pytest.mark.parametrize(("budget", "chosen", "rate"), [(0.05, "cpu-int8", 100.0), (1e-6, "cpu", 100 / 3)])
def test_the_fastest_within_the_budget(
    budget: float, chosen: str, rate: float, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    quantise(bundle_copy, threads=1)
    names = {name: load(bundle_copy, variant=name, threads=1) for name in ("cpu", "cpu-int8")}
    seen: list[Any] = []

    def timed(session: Any, _prompt: Any, way: Any, max_new_tokens: int) -> TimedRun:
        name = next(name for name, each in names.items() if each is session)
        rows = None if way.tree is None else way.tree.rows
        seen.append((name, rows, max_new_tokens))
        return TimedRun(tokens=[1] * 5, step_seconds=[SECONDS[name, rows]] * 4)

    monkeypatch.setattr(module, "timed_run", timed)
    report = module.recommend(names, PROMPTS, budget=budget, max_new_tokens=12)
    assert report["recommended"]["variant"] == chosen and report["recommended"]["speculative"]
    assert report["recommended"]["tokens_per_s"] == pytest.approx(rate)
    assert [each["variant"] for each in report["candidates"]] == ["cpu-int8", "cpu"]
    divergences = {each["variant"]: each["divergence"] for each in report["candidates"]}
    assert divergences["cpu"] < 1e-8 < divergences["cpu-int8"] < 0.05
    assert len([entry for entry in seen if entry[2] == 12]) == 4 * len(PROMPTS)
    assert f"--variant {chosen}, with Medusa" in module.describe(report)
