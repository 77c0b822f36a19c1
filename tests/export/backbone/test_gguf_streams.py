"""Weights of a GGUF file become safetensors a few rows at a time, and a GGUF file is exported like a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from medusa_deploy.export.backbone.backbone import load_config, load_module
from medusa_deploy.export.backbone.gguf_file.metadata import GgufFile
from medusa_deploy.export.backbone.linked import write_gguf_tensors
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import CheckpointError
from support.gguf_files import random_model, write_file, write_model
from support.tiny_gguf import write_tiny_gguf

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("architecture", "config", "fields"),
    [
        ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
        ("gemma", "GemmaConfig", {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_weights_are_the_models(
    architecture: str, config: str, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(config, **fields)
    path = write_model(tmp_path / "a.gguf", model, architecture)
    write_gguf_tensors(GgufFile(path), load_config(path, 64), dtype, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    loaded = dict(load_module(path, "fp16" if dtype == torch.float16 else "fp32").named_parameters())
    assert written.keys() == loaded.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(written[name], loaded[name].detach().numpy())
        np.testing.assert_allclose(written[name], parameter.detach().to(dtype).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_1"])
def test_pieces_are_small_and_have_the_values_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    packed = gguf.GGMLQuantizationType[kind]
    block, size = gguf.constants.GGML_QUANT_SIZES[packed]
    rows, columns = 4100, 512
    data = np.random.default_rng(0).integers(0, 60, (rows, columns // block * size), np.uint8)  # scales stay finite
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pieces = list(GgufFile(tmp_path / "a.gguf").pieces("w", unit=100))
    assert max(piece.nbytes for piece in pieces) <= 2 << 20
    assert all(len(piece) % 100 == 0 for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), gguf.quants.dequantize(data, packed))


def test_weights_that_overflow_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    model.model.norm.weight.data[3] = 1e6
    path = write_model(tmp_path / "a.gguf", model, "llama")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN or infinite values as F16"):
        write_gguf_tensors(GgufFile(path), load_config(path, 64), torch.float16, tmp_path / "a.safetensors")
    model.model.norm.weight.data[3] = float("nan")
    path = write_model(tmp_path / "b.gguf", model, "llama")
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN or infinite values as F32"):
        write_gguf_tensors(GgufFile(path), load_config(path, 64), torch.float32, tmp_path / "b.safetensors")


def test_tensors_without_rows_are_a_named_error(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf", "llama", {}, {"w": np.ones((4, 32), np.float32)})
    file = GgufFile(path)
    file.tensors["w"] = type(file.tensors["w"])((0, 32), 0, 0)
    with pytest.raises(CheckpointError, match="its shape is .0, 32."):
        file.array("w")


@pytest.mark.slow
def test_a_gguf_file_is_exported_with_linked_weights(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    options: dict[str, Any] = {"capacity": 64, "top_k": 4, "max_rows": 8, "prefill_chunk": 16}
    report = export_bundle(tmp_path / "tiny.gguf", None, tmp_path / "bundle", weights="linked", **options)
    assert report["weights"]["files"] == {"model.safetensors": "dequantised to F32"}
    assert all(check["argmax_agreement"] == 1 for check in report["check"].values())
