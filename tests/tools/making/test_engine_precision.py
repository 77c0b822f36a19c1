"""Options of verbs that make an engine's network: when GPTQ runs the model, and what is refused."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("ml_dtypes")

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.tools.making.engine_precision import (
    add_precision_arguments,
    check_rounding,
    gptq_is_needed,
    precision_options,
)


def given(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_precision_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ("--precision int4", True),
        ("--precision int4 --rounding nearest", False),
        ("--precision fp8", False),
        ("--precision fp8 --rounding gptq", True),
        ("--precision fp8 --heads-precision int4", True),
        ("--precision int8", False),
        ("--precision int8 --projection-precision int4", True),
    ],
)
def test_int4_is_rounded_by_gptq_and_fp8_where_it_is_asked_for(arguments: str, needed: bool) -> None:
    args = given(*arguments.split())
    check_rounding(args, precision_options(args))
    assert gptq_is_needed(args, precision_options(args)) is needed


def test_rounding_of_nothing_is_refused() -> None:
    args = given("--precision", "int8", "--rounding", "gptq", "--samples", "4")
    with pytest.raises(UsageError, match="--rounding, --samples: nothing is in int4 or fp8"):
        check_rounding(args, precision_options(args))


def test_projection_and_heads_are_in_int8_beside_int4_and_fp8() -> None:
    for precision in ("int4", "fp8"):
        args = given("--precision", precision)
        assert precision_options(args).precisions(args.precision) == {precision, "int8"}
    args = given("--precision", "fp8", "--projection-precision", "fp8", "--heads-precision", "fp8")
    assert precision_options(args).precisions(args.precision) == {"fp8"}
