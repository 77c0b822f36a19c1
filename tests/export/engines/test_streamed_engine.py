"""Engines that take their weights as inputs, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.export.engines.build import build_engines
from medusa_deploy.export.engines.options import EngineOptions
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.engine_record import parse_engine_record
from medusa_deploy.runtime.files.plan_file import plan_bytes
from support.families import Family, make_family

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]

LAYERS = 3


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as many key heads", "grouped queries"])
def test_every_layers_attention_is_fused_and_the_plan_holds_no_weights(kv_heads: int, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "vocab_size": 512, "num_hidden_layers": LAYERS, "tie_word_embeddings": False,
    }  # fmt: skip
    model = make_family(Family("LlamaConfig", sizes), tmp_path / "model")
    folder = tmp_path / "bundle"
    export_bundle(model, None, folder, dtype="fp16", weights="linked", capacity=128, top_k=4, max_rows=8, prefill_chunk=32)
    build_engines(folder, ["sm_89"], EngineOptions(weights="streamed", rows=[1, 8]))
    bundle = open_bundle(folder)
    record = parse_engine_record(bundle.path(bundle.manifest.engines["sm_89"]).read_bytes())
    assert record.weights == "streamed"
    assert record.logs[record.plan].attention_calls == LAYERS * len(record.profiles)
    inputs = {tensor.name: tensor for tensor in record.inputs}
    streamed = {weight.name: weight for weight in record.weight_inputs}
    assert sum(name.endswith("q_proj+k_proj+v_proj.weight") for name in streamed) == LAYERS
    for name in streamed.keys() & inputs.keys():
        assert (inputs[name].dtype, inputs[name].shape) == (streamed[name].dtype, streamed[name].shape)
    places = sorted(piece for weight in streamed.values() for piece in weight.pieces)
    assert all(bundle.path(piece.file).stat().st_size >= piece.offset + piece.nbytes for piece in places)
    matrices = 2 * sum(parameter.size for parameter in _matrices(folder))
    assert sum(piece.nbytes for piece in places) >= matrices
    stored = bundle.path(f"engines/sm_89/{record.plan}").read_bytes()
    plan = plan_bytes(record.plan, stored, record.compression[record.plan])
    assert len(plan) == record.logs[record.plan].plan_bytes > 10 * len(stored), "kernels repeat each other"
    sample = _matrices(folder)[0].tobytes()[:256]
    assert sample not in plan


def _matrices(folder: Path) -> list:  # type: ignore[type-arg]
    from safetensors.numpy import load_file

    return [tensor for path in (folder / "onnx").glob("*.safetensors") for tensor in load_file(path).values() if tensor.ndim == 2]
