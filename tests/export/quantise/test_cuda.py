"""Weights in 8 bits for the backend cuda: the variant computes what its codes say, close to fp16; what can't be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from medusa_deploy.export.quantise.cuda import BLOCK, NAME, Matrix8, write_cuda_variant  # noqa: E402
from medusa_deploy.runtime.backends import ort_model  # noqa: E402
from medusa_deploy.runtime.errors import BundleExistsError, QuantisationError, UsageError  # noqa: E402
from medusa_deploy.runtime.executors.ort_cuda import OrtDeviceExecutor  # noqa: E402
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle  # noqa: E402
from medusa_deploy.runtime.session import Session, load  # noqa: E402
from medusa_deploy.tools.cli import main  # noqa: E402
from support.plans import EVERYTHING, plain_plan, prefill, run  # noqa: E402

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def half(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp16 that has the variant."""
    bundle = tmp_path_factory.mktemp("half") / "bundle"
    options = ["--heads", str(tiny_heads), "-o", str(bundle), "--dtype", "fp16", "--capacity", "96", "--max-rows", "8"]
    assert main(["export", str(tiny_model), *options]) == 0
    assert main(["quantise", str(bundle), "--backend", "cuda"]) == 0
    return bundle


def on_cpu(bundle: Bundle, variant: str) -> OrtDeviceExecutor:
    return OrtDeviceExecutor(ort_model(bundle, 1, variant), "cpu", threads=1)


@pytest.mark.parametrize("transposed", [True, False])
def test_codes_and_scales_give_the_matrix_back(transposed: bool) -> None:
    weight = (RNG.normal(size=(40, 3 * BLOCK)) * RNG.uniform(1e-4, 3, (40, 1))).astype(np.float16)
    weight[3, :BLOCK] = 0
    matrix = Matrix8("w", ir.tensor(weight if transposed else weight.T.copy(), name="w"), transposed)
    codes, scales = matrix.codes(), matrix.scales()
    assert (codes.shape, codes.dtype) == ((40, 3, BLOCK), np.uint8) and (scales.shape, scales.dtype) == ((40, 3), np.float16)
    assert matrix.nbytes == codes.nbytes + scales.nbytes
    back = ((codes.astype(np.float32) - 128) * scales.astype(np.float32)[..., None]).reshape(weight.shape)
    largest = np.abs(weight.astype(np.float32).reshape(40, 3, BLOCK)).max(-1, keepdims=True)
    # Half a step, and as much again at the end of the range for a scale that fp16 rounds.
    allowed = np.broadcast_to(largest / 127, (40, 3, BLOCK)).reshape(weight.shape) * 0.6 + 1e-4
    assert (np.abs(back - weight.astype(np.float32)) <= allowed).all() and (back[3, :BLOCK] == 0).all()


def test_the_variant_is_near_the_graph_in_fp16(half: Path) -> None:
    bundle = open_bundle(half)
    logits = {}
    for variant in ("standard", NAME):
        executor = on_cpu(bundle, variant)
        prefill(executor, 0, list(range(1, 20)))
        logits[variant] = run(executor, plain_plan(1, 0, 7, 19, EVERYTHING))[0].logits.astype(np.float32)
    off = np.abs(logits["standard"] - logits[NAME]).max() / np.abs(logits["standard"]).max()
    assert 0 < off < 0.03
    placed = on_cpu(bundle, NAME).placement()["CPUExecutionProvider"]
    assert placed["MatMulNBits"] > placed["MatMul"]


def test_the_variant_decodes_and_says_what_it_holds(half: Path) -> None:
    bundle = open_bundle(half)
    session = Session(bundle, on_cpu(bundle, NAME))
    ways = [session.generate(token_ids=[1, 5, 9], max_new_tokens=12, speculative=way) for way in (False, True)]
    plain, drafted = (way.token_ids for way in ways)
    assert len(plain) == 12 and plain == drafted
    made = bundle.manifest.provenance["quantised"][NAME]
    assert made["bits"] == 8 and made["bytes_after"] < 0.6 * made["bytes_before"]


def test_a_variant_for_cuda_runs_there_alone(half: Path) -> None:
    with pytest.raises(UsageError, match="no variant 'cuda-int8' for the CPU"):
        load(half, variant=NAME)
    with pytest.raises(UsageError, match="the backend cuda runs standard, cuda-int8, not 'cpu'"):
        load(half, backend="cuda", variant="cpu")


def test_a_variant_that_is_there_is_replaced_by_force_alone(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleExistsError, match="has a variant cuda-int8"):
        write_cuda_variant(open_bundle(half))
    assert main(["quantise", str(half), "--backend", "cuda", "--force", "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["variant"] == NAME
    assert "--backend cuda --variant cuda-int8" in capsys.readouterr().out
    assert main(["quantise", str(half), "--backend", "cuda", "--bits", "4", "--budget", "0.1"]) == 1
    assert "--bits, --budget: cuda-int8 has 8 bits" in capsys.readouterr().err


def test_a_bundle_in_fp32_is_refused_and_stays(bundle_copy: Path) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    with pytest.raises(QuantisationError, match="no product of fp16 matrices"):
        write_cuda_variant(open_bundle(bundle_copy))
    assert (bundle_copy / "manifest.json").read_bytes() == before


def test_broken_weights_are_named() -> None:
    weight = np.ones((4, BLOCK), np.float16)
    weight[2, 1] = np.inf
    with pytest.raises(QuantisationError, match="the weight w holds NaN or infinity"):
        Matrix8("w", ir.tensor(weight, name="w"), True).codes()
