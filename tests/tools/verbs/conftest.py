"""A second model for verbs that compare."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` with noise on its weights, as a coarse quantisation would leave them."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, weight in module.named_parameters():
        if "proj" in name:
            weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("noisy") / "model"
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_bundle(other_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medusa_deploy.export.exporter import export_bundle

    output = tmp_path_factory.mktemp("noisy") / "bundle"
    export_bundle(other_model, tiny_heads, output, capacity=256, batch=4, top_k=4, max_rows=16, prefill_chunk=16)
    return output
