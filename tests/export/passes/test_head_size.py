"""Heads of a size that ONNX Runtime's fused attention doesn't take: the CPU graph attends by standard operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import Session, load
from medusa_deploy.runtime.tree import ROOT_ONLY, Tree
from support.tiny import HIDDEN, VOCAB

onnx: Any = pytest.importorskip("onnx")

PROMPT = [1, 17, 93, 5, 64, 9, 31, 77, 2, 40]
TREE = Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "max_position_embeddings": 512}
    folder = tmp_path_factory.mktemp("head-size") / "model"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medusa_deploy.export.exporter import export_bundle

    output = tmp_path_factory.mktemp("head-size") / "bundle"
    export_bundle(model, tiny_heads, output, capacity=256, batch=2, top_k=4, max_rows=16, prefill_chunk=16)
    return output


def expected(model: Path, count: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(module(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("variant", ["cpu", "standard"])
def test_tokens_are_those_of_transformers(model: Path, bundle: Path, variant: str) -> None:
    session = load(bundle, variant=variant, threads=1)
    greedy = expected(model, 90)  # beyond 64 cache rows, where more of them become visible
    for options in ({"tree": ROOT_ONLY}, {"tree": TREE}, {"rows": 8}, {}):
        assert _generate(session, **options) == greedy, options


def test_the_cpu_graph_attends_by_standard_operators_and_only_heads_are_in_8_bits(bundle: Path) -> None:
    graph = onnx.load(bundle / "onnx" / "step.cpu.onnx", load_external_data=False).graph
    counted = Counter(node.op_type for node in graph.node)
    assert (counted["Attention"], counted["TensorScatter"], counted["GroupQueryAttention"]) == (2, 4, 0)
    assert counted["MatMulNBits"] == 0, "the backbone's products stay as they are; heads lie in a branch"


def test_it_can_be_quantised(bundle: Path) -> None:
    from medusa_deploy.export.passes.matmuls import find_matmuls
    from medusa_deploy.export.weights import read_graph

    found = find_matmuls(read_graph(bundle / "onnx" / "step.cpu.onnx"))
    assert Counter(matmul.layer for matmul in found if not matmul.of_heads) == {0: 7, 1: 7, None: 1}


def _generate(session: Session, **options: Any) -> list[int]:
    return session.generate(token_ids=PROMPT, max_new_tokens=90, ignore_eos=True, **options).token_ids
