"""The table of GPUs: names, targets and plausible figures."""

from __future__ import annotations

import pytest

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.tools.sizing.gpus import AHEAD_OF_TIME, GPUS, Gpu, find_gpu

every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


@every_gpu
def test_a_gpu_is_found_by_its_name_in_any_spelling(gpu: Gpu) -> None:
    for name in (gpu.name, gpu.name.lower(), gpu.name.replace(" ", ""), f"NVIDIA {gpu.name}", f"GeForce-{gpu.name}"):
        assert find_gpu(name) is gpu


@every_gpu
def test_figures_are_plausible(gpu: Gpu) -> None:
    assert gpu.source in ("wp", "ds")
    assert 4 <= gpu.memory_gb <= 192
    assert 30 <= gpu.bandwidth <= 8000
    if gpu.fp16 is not None and gpu.int8 is not None:
        # Tensor cores do int8 at twice the rate of fp16; with fp32 sums, GeForce cards halve fp16 once more.
        assert gpu.int8 / gpu.fp16 == pytest.approx(2, rel=0.03) or gpu.int8 / gpu.fp16 == pytest.approx(4, rel=0.03)


def test_names_are_unique() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("4090", "RTX 4090"), ("4070", "RTX 4070"), ("4070 ti super", "RTX 4070 Ti SUPER"), ("l4", "L4"), ("a6000", "RTX A6000"),
     ("orin nx 16gb", "Jetson Orin NX 16GB"), ("6000 ada", "RTX 6000 Ada"), ("NVIDIA GeForce RTX 5090", "RTX 5090")],
)  # fmt: skip
def test_a_part_of_a_name_will_do(asked: str, meant: str) -> None:
    assert find_gpu(asked).name == meant


@pytest.mark.parametrize("asked", ["a100", "3080", "4060 ti", "orin nano"])
def test_cards_that_differ_in_memory_are_told_apart(asked: str) -> None:
    with pytest.raises(UsageError, match="may be .*, "):
        find_gpu(asked)


@pytest.mark.parametrize("asked", ["rtx 4099", "rtx 4090 laptop"])
def test_an_unknown_gpu_gets_the_nearest(asked: str) -> None:
    with pytest.raises(UsageError, match="unknown GPU") as caught:
        find_gpu(asked)
    assert "RTX 4090" in caught.value.hint


@pytest.mark.tensorrt
def test_targets_ahead_of_time_are_those_of_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    from medusa_deploy.export.engines.tensorrt import TensorRT
    from medusa_deploy.runtime.executors.tensorrt.engine import HERE

    assert {*AHEAD_OF_TIME, HERE} == set(TensorRT("tensorrt-rtx").targets)
