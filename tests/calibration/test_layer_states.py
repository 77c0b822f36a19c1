"""The hidden state behind every layer is found in every step graph, and is what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import helper  # noqa: E402

from medusa_deploy.calibration.int8.layer_states import LayerStates, layer_outputs  # noqa: E402
from medusa_deploy.runtime.files.bundle import open_bundle  # noqa: E402

TOKENS = np.random.default_rng(1).integers(3, 128, 40).tolist()


def nodes_of(*lines: str) -> list[onnx.NodeProto]:
    """Nodes from lines like ``y = Add x f``."""
    made = []
    for line in lines:
        output, _, right = line.partition(" = ")
        kind, *inputs = right.split()
        made.append(helper.make_node(kind, inputs, output.split(",")))
    return made


EMBED = "x = Gather table tokens"
LAYER_0 = ["n = Norm x", "a = Attention n past_key.0 past_value.0", "y = Add x a", "m = MLP y", "z = Add y m"]
LAYER_1 = ["b = Attention z past_key.1 past_value.1", "v = Add z b", "q = MLP v", "w = Add v q", "hidden = Norm w"]


@pytest.mark.parametrize("variant", ["standard", "cpu"])
def test_every_layer_hands_on_what_transformers_says(variant: str, tiny_bundle: Path, tiny_model: Path):
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        expected = module.model(torch.tensor([TOKENS]), output_hidden_states=True)
    first, second = LayerStates(open_bundle(tiny_bundle), variant, 1).states(TOKENS)
    assert first is not None and second is not None
    np.testing.assert_allclose(first, expected.hidden_states[1][0], atol=1e-4)
    normalised = module.model.norm(torch.from_numpy(second))  # as transformers returns the last layer's
    np.testing.assert_allclose(normalised.detach(), expected.last_hidden_state[0], atol=1e-4)


def test_states_are_those_of_the_newest_text(tiny_bundle: Path):
    executor = LayerStates(open_bundle(tiny_bundle), "cpu", 1)
    executor.states(TOKENS)
    again, _ = executor.states(TOKENS[:5])
    assert again is not None
    assert again.shape == (5, 64)


def test_the_stream_is_followed_through_casts_fused_sums_and_biases():
    assert layer_outputs(nodes_of(EMBED, *LAYER_0, *LAYER_1), 2) == ["z", "w"]
    cast = [line.replace("Add y m", "Add other m") for line in [*LAYER_0[:4], "other = Cast y", LAYER_0[4]]]
    assert layer_outputs(nodes_of(EMBED, *cast, *LAYER_1), 2) == ["z", "w"]
    fused = [line.replace("v = Add z b", "u,mean,deviation,v = SkipSimplifiedLayerNormalization z b weight") for line in LAYER_1]
    assert layer_outputs(nodes_of(EMBED, *LAYER_0, *fused), 2) == ["z", "w"]
    biased = [*LAYER_1[:2], "r = MLP v", "q = Add r bias", *LAYER_1[3:]]
    assert layer_outputs(nodes_of(EMBED, *LAYER_0, *biased), 2) == ["z", "w"]


def test_attention_and_mlp_side_by_side_are_one_layer():
    side_by_side = ["a = Attention x past_key.0", "m = MLP x", "half = Add x a", "z = Add half m"]
    assert layer_outputs(nodes_of(EMBED, *side_by_side, *LAYER_1), 2) == ["z", "w"]


def test_a_caches_size_makes_no_layer():
    sized = ["s = Shape past_key.1", "n = Norm x s", *LAYER_0[1:]]
    assert layer_outputs(nodes_of(EMBED, *sized, *LAYER_1), 2) == ["z", "w"]


def test_what_is_built_otherwise_is_not_found():
    scaled = [line.replace("w = Add v q", "w = Mul v q") for line in LAYER_1[:-1]]
    layer_2 = ["c = Attention w past_key.2 past_value.2", "p = Add w c", "hidden = Norm p"]
    assert layer_outputs(nodes_of(EMBED, *LAYER_0, *scaled, *layer_2), 3) == [None, "w", "p"]
    assert layer_outputs(nodes_of(EMBED, *LAYER_0, *LAYER_1[:-1]), 2) == [None, None], "no hidden state to begin from"
