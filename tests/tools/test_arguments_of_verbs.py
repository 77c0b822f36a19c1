"""The functions behind the verbs take Python's and numpy's values alike, and refuse others by name before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

from medusa_deploy.calibration.int8.ranges import Method
from medusa_deploy.calibration.training.finetune import FinetuneConfig
from medusa_deploy.calibration.training.train import TrainConfig
from medusa_deploy.export.engines.build import build_engines, check_engines, plan_engines
from medusa_deploy.export.engines.options import EngineOptions
from medusa_deploy.export.estimate import plan_export
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.quantise.cpu import CpuPrecision
from medusa_deploy.export.quantise.w8a8 import PrecisionOptions
from medusa_deploy.runtime.errors import DeployError, TreeError, UsageError
from medusa_deploy.runtime.tree import Tree
from medusa_deploy.tools.making.scales import calibrate
from medusa_deploy.tools.making.variant import quantise
from medusa_deploy.tools.sizing.deployment import plan_deployment
from medusa_deploy.tools.training.answering import AnswerPlan
from medusa_deploy.tools.training.backbone import train_backbone
from medusa_deploy.tools.training.heads import train
from medusa_deploy.tools.verbs.inspect import inspect_bundle
from support.tiny import VOCAB

PLAN = AnswerPlan(Path("model"), Path("work"))
RECORDS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (EngineOptions, {"rows": np.array([1, 8]), "prefill": np.int64(16), "features": None, "quantised": None}),
    (PrecisionOptions, {"scales": "a.json", "keep": ["down"], "projection": None}),
    (CpuPrecision, {"layers": np.int64(4), "block": np.int32(32), "kept": None, "rescored": None}),
    (Method, {"name": None, "percentile": np.float32(50)}),
    (TrainConfig, {"kind": None, "epochs": np.int64(2), "learning_rate": np.float64(1e-3), "autocast": np.False_}),
    (FinetuneConfig, {"rank": np.int64(2), "alpha": np.float32(4), "time_limit": None, "epochs": None}),
    (AnswerPlan, {"model": "m", "work": "w", "slots": np.int64(2), "temperatures": np.array([0, 1]), "seed": None}),
]
WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (EngineOptions, {"rows": "18"}, "rows"),
    (EngineOptions, {"rows": [1.5]}, "rows"),
    (EngineOptions, {"prefill": "16"}, "prefill"),
    (EngineOptions, {"backend": 3}, "backend"),
    (EngineOptions, {"features": "x"}, "features"),
    (EngineOptions, {"quantised": {}}, "quantised"),
    (PrecisionOptions, {"scales": 3}, "scales"),
    (PrecisionOptions, {"keep": "down", "scales": "a"}, "keep"),
    (CpuPrecision, {"layers": "8"}, "layers"),
    (CpuPrecision, {"kept": ["a"]}, "kept"),
    (CpuPrecision, {"rescored": -1}, "rescored"),
    (Method, {"percentile": "99"}, "percentile"),
    (TrainConfig, {"epochs": 0}, "epochs"),
    (TrainConfig, {"num_heads": "4"}, "num_heads"),
    (TrainConfig, {"kind": "eagle"}, "kind"),
    (FinetuneConfig, {"rank": 1.5}, "rank"),
    (FinetuneConfig, {"autocast": "no"}, "autocast"),
    (AnswerPlan, {"model": None, "work": "w"}, "model"),
    (AnswerPlan, {"model": "m", "work": "w", "slots": 0}, "slots"),
    (AnswerPlan, {"model": "m", "work": "w", "temperatures": 0.5}, "temperatures"),
    (plan_deployment, {"size": "7b", "batch": "2"}, "batch"),
    (plan_deployment, {"size": "7b", "rows": "1,8"}, "rows"),
    (plan_deployment, {"size": "7b", "acceptance": "2"}, "acceptance"),
]
CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (build_engines, (None, ["sm_89"]), {}, "bundle"),
    (build_engines, ("{bundle}", "sm_89"), {}, "targets"),
    (build_engines, ("{bundle}", ["sm_89"], {"rows": [1]}), {}, "options"),
    (build_engines, ("{bundle}", ["sm_89"]), {"force": "no"}, "force"),
    (plan_engines, ("{bundle}", "sm_89"), {}, "targets"),
    (check_engines, ("sm_89", None), {}, "targets"),
    (quantise, (3,), {}, "bundle"),
    (quantise, ("{bundle}",), {"precision": 8}, "precision"),
    (quantise, ("{bundle}",), {"budget": "small"}, "budget"),
    (quantise, ("{bundle}",), {"samples": 0}, "samples"),
    (quantise, ("{bundle}",), {"rounding": "up"}, "rounding"),
    (quantise, ("{bundle}",), {"threads": "2"}, "threads"),
    (calibrate, ("{bundle}", None), {}, "output"),
    (calibrate, ("{bundle}", "{out}"), {"method": "max"}, "method"),
    (calibrate, ("{bundle}", "{out}"), {"samples": 1.5}, "samples"),
    (calibrate, ("{bundle}", "{out}"), {"smooth": "much"}, "smooth"),
    (calibrate, ("{bundle}", "{out}"), {"layer_by_layer": 1}, "layer_by_layer"),
    (train, (None, "{out}", {}), {}, "plan"),
    (train, (PLAN, "{out}", {}), {"tree_rows": "5"}, "tree_rows"),
    (train, (PLAN, "{out}", {"layers": 3}), {}, "unknown settings layers"),
    (train_backbone, (PLAN, "{out}", {"rank": 2}, "heads"), {}, "config"),
    (train_backbone, (PLAN, "{out}", FinetuneConfig(), None), {}, "heads"),
    (inspect_bundle, (None,), {}, "bundle"),
    (inspect_bundle, ("{bundle}",), {"check_hashes": "yes"}, "check_hashes"),
    (export_bundle, (None, None, "{out}"), {}, "model"),
    (export_bundle, ("{model}", 3, "{out}"), {}, "heads"),
    (export_bundle, ("{model}", None, ""), {}, "output"),
    (export_bundle, ("{model}", None, "{out}"), {"dtype": 16}, "dtype"),
]


@pytest.mark.parametrize(("kind", "given"), RECORDS, ids=lambda value: getattr(value, "__name__", ""))
def test_settings_take_numpys_values_and_none(kind: Callable[..., Any], given: dict[str, Any]) -> None:
    found = kind(**given)
    for name in given:
        value = getattr(found, name)
        assert type(value).__module__ != "numpy"
        assert not isinstance(value, tuple) or all(type(each).__module__ != "numpy" for each in value)


@pytest.mark.parametrize(("kind", "given", "name"), WRONG, ids=lambda value: getattr(value, "__name__", str(value)))
def test_settings_of_other_types_are_refused_by_name(kind: Callable[..., Any], given: dict[str, Any], name: str) -> None:
    with pytest.raises(DeployError, match=name) as caught:
        kind(**given)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("function", "given", "options", "name"), CALLS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_arguments_of_other_types_are_refused_by_name(
    function: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any], name: str,
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    places = {"{bundle}": str(tiny_bundle), "{model}": str(tiny_model), "{out}": str(tmp_path / "out")}
    filled = [places.get(each, each) if isinstance(each, str) else each for each in given]
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")}
    with pytest.raises(UsageError, match=name) as caught:
        function(*filled, **options)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"top_k": 1000}, DeployError, "top.k is 1000"),
        ({"top_k": 2000}, UsageError, "top_k is 2000"),
        ({"capacity": 1 << 30}, UsageError, "capacity is"),
        ({"max_rows": 1000}, UsageError, "max_rows is 1000"),
        ({"tree": [[0]]}, UsageError, "tree is"),
        ({"top_k": 2, "tree": Tree.from_choices([[0], [2]])}, TreeError, "rank 2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_heads", [True, False])
def test_limits_that_do_not_fit_are_refused_before_weights_are_read(
    options: dict[str, Any], error: type[DeployError], reason: str, with_heads: bool,
    tiny_model: Path, tiny_heads: Path, tmp_path: Path,
) -> None:  # fmt: skip
    assert options.get("top_k", VOCAB + 1) != VOCAB
    phases: list[str] = []
    heads = tiny_heads if with_heads else None
    with pytest.raises(error, match=reason):
        export_bundle(tiny_model, heads, tmp_path / "bundle", report=phases.append, **options)
    with pytest.raises(error, match=reason):
        plan_export(tiny_model, heads, **options)
    assert not phases and not (tmp_path / "bundle").exists()
