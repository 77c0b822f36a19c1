from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from medusa_deploy.calibration.int8.layer_states import layer_outputs
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import UnsupportedArchitectureError
from medusa_deploy.runtime.files.bundle import open_bundle
from support.families import FAMILIES, SIZES, Family, make_config, make_family, rope

CAPACITY = 64
PROMPT = np.random.default_rng(3).integers(3, SIZES["vocab_size"], 20).tolist()
NEW_TOKENS = 40


def transformers_greedy(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_generates_what_transformers_does(name: str, tiny_heads: Path, tmp_path: Path) -> None:
    model = make_family(FAMILIES[name], tmp_path / "model")
    report = export_bundle(model, tiny_heads, tmp_path / "bundle", capacity=CAPACITY, top_k=4, max_rows=8, prefill_chunk=16)
    for variant, check in report["check"].items():
        assert check["argmax_agreement"] == 1, variant
        assert check["head_agreement"] >= (0.6 if variant == "cpu" else 1), variant  # random heads in 8 bits: near-ties
        assert check["max_logit_error"] < 1e-4 * max(1, check["logit_scale"]), variant
    for variant, file in open_bundle(tmp_path / "bundle").manifest.variants.items():
        graph = onnx.load(tmp_path / "bundle" / file, load_external_data=False).graph
        assert None not in layer_outputs(graph.node, SIZES["num_hidden_layers"]), variant
    expected = transformers_greedy(model)
    for variant in ("cpu", "standard"):
        session = load(tmp_path / "bundle", variant=variant, threads=1)
        for speculative in (False, True):
            generation = session.generate(token_ids=PROMPT, max_new_tokens=NEW_TOKENS, ignore_eos=True, speculative=speculative)
            assert generation.token_ids == expected, (variant, speculative)


MISTRAL = Family("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 32})
LONGROPE = FAMILIES["phi3: longrope within its limit"]
REFUSED: dict[str, tuple[Family, str, str]] = {
    "mistral's window": (MISTRAL, "sliding window of 32 tokens, fewer than the capacity 64", "--capacity 32"),
    "qwen2's window": (
        Family("Qwen2Config", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        "sliding window of 32",
        "--capacity 32",
    ),
    "phi3's window": (Family("Phi3Config", {"sliding_window": 63}), "sliding window of 63", "--capacity 63"),
    "gemma2's soft cap": (Family("Gemma2Config", {"num_key_value_heads": 2}), "caps its attention logits at 50", "soft cap"),
    "gemma2's soft cap on logits": (
        Family("Gemma2Config", {"num_key_value_heads": 2, "attn_logit_softcapping": None}),
        "final_logit_softcapping is 30",
        "another backbone",
    ),
    "cohere's scale of logits": (Family("CohereConfig"), "logit_scale is 0.0625", "another backbone"),
    "longrope beyond its limit": (
        replace(LONGROPE, fields={**LONGROPE.fields, "original_max_position_embeddings": 63}),
        "longrope position frequencies beyond 63 tokens, the capacity is 64",
        "--capacity 63",
    ),
    "dynamic rope beyond its limit": (
        Family("LlamaConfig", {"max_position_embeddings": 48, **rope("dynamic", factor=2.0)}),
        "dynamic position frequencies beyond 48",
        "--capacity 48",
    ),
    "linear attention": (
        Family("LlamaConfig", {"layer_types": ["full_attention", "linear_attention"]}),
        "has linear_attention",
        "full attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_cant_express_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family, message, hint = REFUSED[name]
    make_config(family).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedArchitectureError, match=message) as caught:
        export_bundle(tmp_path / "model", None, tmp_path / "bundle", capacity=CAPACITY)
    assert hint in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_window_that_no_layer_uses_is_no_window(tmp_path: Path) -> None:
    from medusa_deploy.export.backbone.backbone import check_architecture

    unused: list[dict[str, Any]] = [{"use_sliding_window": False}, {"use_sliding_window": True, "max_window_layers": 2}]
    for fields in unused:
        check_architecture(make_config(Family("Qwen2Config", {"sliding_window": 32, **fields})), CAPACITY)
