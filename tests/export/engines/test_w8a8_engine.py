"""Engines with activations in 8 bits, by TensorRT-RTX: products of integers on every target, and records that say of what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medusa_deploy.export.engines.build import build_engines
from medusa_deploy.export.engines.builder_process import BuildRequest, build_plan
from medusa_deploy.export.engines.network import network_source
from medusa_deploy.export.engines.options import EngineOptions, profiles_for, step_axes, step_sizes
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.quantise.w8a8 import Int8Options
from medusa_deploy.runtime.errors import ScalesMismatchError, UsageError
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle, sha256
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


def products_of_integers(plan: Path) -> int:
    """How many of a plan's matrix products read two int8 tensors, by what TensorRT-RTX writes into it."""
    content = plan.read_bytes()
    read = [
        match.groups()
        for match in re.finditer(rb'fully_connected=\{ name="[^"]*" output=\{[^}]*\} ?input=\{"([^"]+)" "([^"]+)"', content)
    ]
    kinds = dict(re.findall(rb' name="([^"]+)" offset=[^}\n]*?(?:\{[^}\n]*\}[^}\n]*?)*? type=([a-z0-9]+)', content))
    return sum(all(kinds.get(name) == b"int8" for name in names) for names in read)


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_products_of_the_backbone_are_of_integers(bundle: Bundle, target: str, tmp_path: Path) -> None:
    counts = {}
    for name, scales in (("weights", None), ("both", bundle.folder.parent / "scales.json")):
        (tmp_path / name).mkdir()
        options = Int8Options(scales, None if scales is None else ())
        with network_source(bundle, "int8", "inside", tmp_path / name, options) as source:
            [_, profile] = profiles_for(bundle.manifest, [8])
            plan = tmp_path / f"{name}.plan"
            request = BuildRequest("tensorrt-rtx", target, str(source.step), str(plan), step_axes(LAYERS), (step_sizes(profile),))
            built = build_plan(request, lambda *_step: True)
        assert built.log.attention_calls == LAYERS
        counts[name] = products_of_integers(plan)
    assert counts["weights"] == 0
    assert counts["both"] >= 4 * LAYERS, "q, k and v may be one product, as may gate and up"


def test_the_record_says_with_which_scales_and_resume_looks_at_them(bundle: Bundle, tmp_path: Path) -> None:
    scales = bundle.folder.parent / "scales.json"
    options = EngineOptions(precision="int8", int8=Int8Options(scales, heads="fp16"), rows=[8])
    [built] = build_engines(bundle.folder, ["sm_89"], options)
    assert built["record"].int8 == {"heads": "fp16", "scales_sha256": sha256(scales), "keep": "auto"}
    [again] = build_engines(bundle.folder, ["sm_89"], options, resume=True)
    assert again["kept"]
    [other] = build_engines(bundle.folder, ["sm_89"], EngineOptions(precision="int8", rows=[8]), resume=True)
    assert not other["kept"] and other["record"].int8 == {}


def test_scales_of_another_model_and_layers_that_are_not_there_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    scales = bundle.folder.parent / "scales.json"
    with pytest.raises(UsageError, match="no layer 'down'"):
        build_engines(bundle.folder, ["sm_89"], EngineOptions(precision="int8", int8=Int8Options(scales, ("down",))), force=True)
    with pytest.raises(UsageError, match="in fp16"):
        build_engines(bundle.folder, ["sm_89"], EngineOptions(int8=Int8Options(scales)), force=True)
    stub = half_precision_bundle(tmp_path / "stub")
    with pytest.raises(ScalesMismatchError):
        build_engines(stub, ["sm_89"], EngineOptions(precision="int8", int8=Int8Options(scales)))
