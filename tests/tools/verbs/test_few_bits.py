"""export --precision: a bundle of one quantised graph runs as any other, and holds no float32 matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.sampling import SamplingParams
from medusa_deploy.runtime.session import load
from medusa_deploy.tools.cli import main
from medusa_deploy.tools.making.few_bits import export_few_bits
from medusa_deploy.tools.measure.agreement import Agreement
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import VOCAB

PROMPTS = random_prompts(VOCAB, 256, 16, seed=2)
SIZES = ["--capacity", "256", "--top-k", "4", "--max-rows", "16", "--prefill-chunk", "16"]
PROMPT = PROMPTS[0][:8]


def write_data(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="module", params=["int8", "int4"])
def few_bits(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model with its heads, exported in few bits from linked weights, as a large model is."""
    folder = tmp_path_factory.mktemp("few")
    options = ["--heads", str(tiny_heads), "--precision", request.param, "--weights", "linked", "--data", str(write_data(folder))]
    assert main(["export", str(tiny_model), *options, *SIZES, "-o", str(folder / "bundle")]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["bundle", "prompts.jsonl"], "nothing is left beside it"
    return folder / "bundle"


def test_it_holds_one_graph_and_no_float32_matrix(few_bits: Path) -> None:
    manifest = open_bundle(few_bits).manifest
    (variant,) = manifest.variants
    assert variant in ("cpu-int8", "cpu-int4") and list(manifest.provenance["quantised"]) == [variant]
    for graph in (manifest.graph(variant), manifest.heads_graph):
        tensors = [value.const_value for value in ir.load(few_bits / graph).graph.initializers.values()]
        codes = {tensor.name for tensor in tensors if tensor is not None and tensor.dtype == ir.DataType.UINT8}
        assert codes, "matrices in few bits"
        for tensor in tensors:
            name = "" if tensor is None else str(tensor.name)
            scales = name.endswith("/scales") and name.replace("/scales", "/codes") in codes
            rotation = name.endswith("_output/table")  # of positions: computed, no weight
            assert tensor is None or scales or rotation or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2, name


def test_a_dry_run_knows_its_size(
    few_bits: Path, tiny_model: Path, tiny_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precision = next(iter(open_bundle(few_bits).manifest.variants)).removeprefix("cpu-")
    command = ["export", str(tiny_model), "--heads", str(tiny_heads), "--precision", precision, "--dry-run", "--json", "-"]
    assert main([*command, *SIZES, "-o", str(tmp_path / "bundle")]) == 0
    told = json.loads(capsys.readouterr().out)["weights_bytes"]
    tensors = {
        (tensor.offset, tensor.nbytes)
        for value in ir.load(next((few_bits / "onnx").glob("step.cpu-int?.onnx"))).graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    assert told == pytest.approx(sum(size for _, size in tensors), rel=0.15)


def test_load_takes_its_only_graph_and_every_mode_runs(few_bits: Path) -> None:
    session = load(few_bits, threads=1)
    plain = session.generate(token_ids=PROMPT, max_new_tokens=24, speculative=False).token_ids
    assert session.generate(token_ids=PROMPT, max_new_tokens=24).token_ids == plain
    assert session.generate(token_ids=PROMPT, max_new_tokens=8, params=SamplingParams(mode="typical", seed=1)).token_ids
    several = load(few_bits, threads=1, slots=2)
    assert several.generate(token_ids=PROMPT, max_new_tokens=24).token_ids == plain
    assert main(["verify", str(few_bits), "--count", "2", "--max-new-tokens", "8", "--threads", "1", "--trees", "chain"]) == 0
    assert main(["inspect", str(few_bits)]) == 0


def test_its_predictions_are_near_those_of_float32(few_bits: Path, tiny_session) -> None:  # type: ignore[no-untyped-def]
    agreement = Agreement(tiny_session, load(few_bits, threads=1), 8)
    for prompt in PROMPTS[:4]:
        agreement.read(prompt, 1)
    limit = 0.1 if "cpu-int4" in open_bundle(few_bits).manifest.variants else 0.002
    assert agreement.report()["kl_nats"]["mean"] < limit


@pytest.mark.parametrize("verb", [["quantise"], ["calibrate", "-o", "scales.json"], ["bench", "--variant", "cpu"]])
def test_what_needs_the_float32_graph_says_so(
    verb: list[str], few_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb[0], str(few_bits), *verb[1:]]) == 1
    assert "its variants: cpu-int" in (shown := capsys.readouterr().err) or "without --precision" in shown
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_the_export(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(UsageError, match="int8 of fp16"):
        export_few_bits(tiny_model, None, output, "int8", dtype="fp16")
    with pytest.raises(UsageError, match="precision"):
        export_few_bits(tiny_model, None, output, "int5")
    assert main(["export", str(tiny_model), "--no-heads", "-o", str(output), "--samples", "4"]) == 1
    assert not list(tmp_path.iterdir())
