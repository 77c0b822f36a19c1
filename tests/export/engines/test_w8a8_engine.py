"""Engines of few bits, by TensorRT-RTX: what their products multiply, what GPUs lack, and records that say of what."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.export.engines.build import build_engines, plan_engines
from medusa_deploy.export.engines.builder_process import BuildRequest, build_plan
from medusa_deploy.export.engines.network import network_source
from medusa_deploy.export.engines.options import EngineOptions, profiles_for, step_axes, step_sizes
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.quantise.w8a8 import PrecisionOptions
from medusa_deploy.runtime.errors import ScalesMismatchError, UsageError
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle, sha256
from medusa_deploy.runtime.files.engine_record import BuildLog
from medusa_deploy.tools.making.scales import calibrate
from medusa_deploy.tools.prompt_source import random_prompts
from support.fake_tensorrt import half_precision_bundle
from support.families import Family, make_family

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]

LAYERS, VOCAB = 2, 512
SIZES = {
    "hidden_size": 256, "vocab_size": VOCAB, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_key_value_heads": 2,
    "head_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny fp16 Llama, with the scales of a few random prompts beside it."""
    folder = tmp_path_factory.mktemp("w8a8")
    model = make_family(Family("LlamaConfig", SIZES), folder / "model")
    options = {"dtype": "fp16", "capacity": 128, "top_k": 4, "max_rows": 16, "prefill_chunk": 32}
    export_bundle(model, None, folder / "bundle", **options)  # type: ignore[arg-type]
    data = folder / "prompts.jsonl"
    data.write_text("".join(f'{{"token_ids": {prompt}}}\n' for prompt in random_prompts(VOCAB, 100, 6, seed=1)), "utf-8")
    calibrate(folder / "bundle", folder / "scales.json", data, max_new_tokens=16, threads=1)
    return open_bundle(folder / "bundle")


def built(bundle: Bundle, precision: str, target: str, folder: Path, weights: str, options: PrecisionOptions) -> BuildLog:
    """Builds the step of 8 rows and returns the log."""
    folder.mkdir()
    with network_source(bundle, precision, weights, folder, options) as source:
        [_, profile] = profiles_for(bundle.manifest, [8], precision=precision)
        axes = step_axes(LAYERS) | {weight.name: "." for weight in source.weight_inputs}
        plan = str(folder / "step.plan")
        request = BuildRequest("tensorrt-rtx", target, str(source.step), plan, axes, (step_sizes(profile),))
        return build_plan(request, lambda *_step: True).log


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120"])
def test_products_of_the_backbone_are_of_integers(bundle: Bundle, target: str, tmp_path: Path) -> None:
    counts = {}
    for name, scales in (("weights", None), ("both", bundle.folder.parent / "scales.json")):
        options = PrecisionOptions(scales, None if scales is None else ())
        log = built(bundle, "int8", target, tmp_path / name, "inside", options)
        assert log.attention_calls == LAYERS
        counts[name] = log.kernels.get("product(int8, int8)", 0)
    assert counts["weights"] == 0
    assert counts["both"] >= 4 * LAYERS, "q, k and v may be one product, as may gate and up"


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_int4_weights_stay_int4_and_are_widened_inside_the_product(bundle: Bundle, target: str, tmp_path: Path) -> None:
    log = built(bundle, "int4", target, tmp_path / "int4", "inside", PrecisionOptions(bundle.folder.parent / "scales.json"))
    matrices = LAYERS * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
    assert log.constants["int4"] == matrices // 2
    assert log.constants["int8"] >= VOCAB * 256, "the projection is int8 unless it is asked to be int4"
    assert sum(count for name, count in log.kernels.items() if name.endswith("Fc")) >= 4 * LAYERS


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
@pytest.mark.parametrize("weights", ["inside", "streamed"])
def test_products_of_the_backbone_are_of_fp8(bundle: Bundle, target: str, weights: str, tmp_path: Path) -> None:
    log = built(bundle, "fp8", target, tmp_path / "fp8", weights, PrecisionOptions(bundle.folder.parent / "scales.json"))
    assert log.attention_calls == LAYERS
    assert log.kernels["product(fp8_e4m3, fp8_e4m3)"] >= 4 * LAYERS
    matrices = LAYERS * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
    small = LAYERS * 2 * 256 * 128  # keys and values: below 64 KiB matrices stay where they are
    assert log.constants["fp8_e4m3"] == small if weights == "streamed" else log.constants["fp8_e4m3"] >= matrices
    if weights == "inside":
        assert log.constants["int8"] >= VOCAB * 256, "the projection is int8 unless it is asked to be fp8"


def test_what_a_gpu_lacks_is_refused_before_anything_is_built(bundle: Bundle) -> None:
    for target, precision, options in (
        ("sm_75", "int4", {}),
        ("sm_86", "fp8", {}),
        ("sm_86", "int8", {"heads": "fp8"}),
        ("sm_75", "int8", {"projection": "int4"}),
    ):
        with pytest.raises(UsageError, match=f"needs sm_.. or newer, and {target}"):
            plan_engines(bundle.folder, [target], EngineOptions(precision=precision, quantised=PrecisionOptions(**options)))


def test_streamed_weights_of_few_bits_lie_beside_the_plan(bundle: Bundle) -> None:
    options = EngineOptions(precision="fp8", weights="streamed", rows=[8])
    [made] = build_engines(bundle.folder, ["sm_89"], options, force=True)
    opened, record = open_bundle(bundle.folder), made["record"]
    assert {weight.dtype for weight in record.weight_inputs} == {"float16", "float8_e4m3fn", "int8"}
    stored = []
    for weight in record.weight_inputs:
        [piece] = weight.pieces
        assert piece.file == "engines/sm_89/weights.bin" and piece.file in opened.manifest.files
        stored.append(opened.path(piece.file).read_bytes()[piece.offset : piece.offset + piece.nbytes])
        assert len(stored[-1]) == piece.nbytes
    assert sum(any(data) for data in stored) > len(stored) / 2, "the head of a bundle without heads is zero"


def test_the_record_says_with_which_scales_and_resume_looks_at_them(bundle: Bundle, tmp_path: Path) -> None:
    scales = bundle.folder.parent / "scales.json"
    options = EngineOptions(precision="int8", quantised=PrecisionOptions(scales, heads="fp16"), rows=[8])
    [made] = build_engines(bundle.folder, ["sm_89"], options, force=True)
    assert made["record"].quantised == {"heads": "fp16", "scales_sha256": sha256(scales), "keep": "auto"}
    [again] = build_engines(bundle.folder, ["sm_89"], options, resume=True)
    assert again["kept"]
    [other] = build_engines(bundle.folder, ["sm_89"], EngineOptions(precision="int8", rows=[8]), resume=True)
    assert not other["kept"] and other["record"].quantised == {}


def test_scales_of_another_model_and_layers_that_are_not_there_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    scales = bundle.folder.parent / "scales.json"
    with pytest.raises(UsageError, match="no layer 'down'"):
        kept = PrecisionOptions(scales, ("down",))
        build_engines(bundle.folder, ["sm_89"], EngineOptions(precision="int8", quantised=kept), force=True)
    with pytest.raises(UsageError, match="in fp16"):
        build_engines(bundle.folder, ["sm_89"], EngineOptions(quantised=PrecisionOptions(scales)), force=True)
    stub = half_precision_bundle(tmp_path / "stub")
    with pytest.raises(ScalesMismatchError):
        build_engines(stub, ["sm_89"], EngineOptions(precision="int8", quantised=PrecisionOptions(scales)))
