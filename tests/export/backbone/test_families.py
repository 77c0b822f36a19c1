from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from medusa_deploy.calibration.int8.layer_states import layer_outputs
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime import load
from medusa_deploy.runtime.drafting.draft import Candidates, Draft, compiled
from medusa_deploy.runtime.errors import UnsupportedArchitectureError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.request import AUTOMATIC, Request
from medusa_deploy.runtime.tree import ROOT_ONLY
from support.families import FAMILIES, SIZES, Family, make_config, make_family, rope

CAPACITY = 64
PROMPTS = [np.random.default_rng(length).integers(3, SIZES["vocab_size"], length).tolist() for length in (20, 37)]
NEW_TOKENS = 27


@torch.no_grad()
def transformers_greedy(folder: Path) -> list[list[int]]:
    """Answers to the prompts by transformers' eager attention, which computes every sequence as a whole."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


class Knowing:
    """Drafts the next one to three tokens of ``answer``, with a wrong token beside each: accepted rows are never neighbours."""

    rows, heads = 7, False

    def __init__(self, answer: list[int]) -> None:
        self._answer = answer
        self._emitted, self._step = 1, 0

    def draft(self, candidates: Candidates | None) -> Draft:
        self._step += 1
        right = [*self._answer[self._emitted :], 0, 0, 0][: 1 + self._step % 3]
        self._emitted += 1 + len(right)
        paths = [tuple(right[:depth]) for depth in range(len(right))]
        drafted = [path for depth, path in enumerate(paths) for path in ((*path, right[depth] ^ 1), (*path, right[depth]))]
        return compiled(drafted, looked_up=False)


WAYS = [(name, "copied") for name in FAMILIES]
WAYS += [(name, "linked") for name in FAMILIES if name.startswith(("mistral: windows", "gemma2:", "gemma3:"))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), WAYS)
def test_a_family_generates_what_transformers_does(name: str, weights: str, tiny_heads: Path, tmp_path: Path) -> None:
    model = make_family(FAMILIES[name], tmp_path / "model")
    report = export_bundle(
        model, tiny_heads, tmp_path / "bundle", weights=weights, capacity=CAPACITY, top_k=4, max_rows=8, prefill_chunk=16, batch=2
    )
    for variant, check in report["check"].items():
        assert check["argmax_agreement"] == 1, variant
        assert check["head_agreement"] >= (0.6 if variant == "cpu" else 1), variant  # random heads in 8 bits: near-ties
        assert check["max_logit_error"] < 1e-4 * max(1, check["logit_scale"]), variant
    for variant, file in open_bundle(tmp_path / "bundle").manifest.variants.items():
        graph = onnx.load(tmp_path / "bundle" / file, load_external_data=False).graph
        assert None not in layer_outputs(graph.node, make_config(FAMILIES[name]).num_hidden_layers), variant
    expected = transformers_greedy(model)
    assert sum(len(set(answer)) for answer in expected) > 8, "answers that repeat themselves tell little"
    requests = [Request(token_ids=prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    for variant in ("cpu", "standard"):
        session = load(tmp_path / "bundle", variant=variant, threads=1, slots=2)
        knowing = [Knowing(answer) for answer in expected]
        for ways in ([ROOT_ONLY] * 2, [session.tree] * 2, [AUTOMATIC] * 2, knowing):
            drafted = [replace(request, drafting=way) for request, way in zip(requests, ways, strict=True)]
            found = dict(session.generate_many(drafted))
            assert [found[index].token_ids for index in range(2)] == expected, (variant, ways)
        assert all(found[index].stats.steps < NEW_TOKENS / 2 for index in range(2)), "drafts were accepted"


LONGROPE = FAMILIES["phi3: longrope within its limit"]
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE_OF_32 = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 128,
    "long_factor": [2.0] * 128,
    "original_max_position_embeddings": 32,
}
REFUSED: dict[str, tuple[Family, str, str]] = {
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
    "longrope beyond its limit in some layers": (
        Family("Gemma3TextConfig", {"rope_parameters": {"full_attention": LONGROPE_OF_32, "sliding_attention": DEFAULT_ROPE}}),
        "longrope position frequencies beyond 32 tokens",
        "--capacity 32",
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
