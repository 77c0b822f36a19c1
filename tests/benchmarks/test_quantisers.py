"""benchmarks/quantisers.py: the judge counts what it says, and libraries' graphs of the step are fed and judged like ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from quantiser.judge import Judge
from quantiser.modelopt import configured
from quantiser.onnx_libraries import Graph, quantise
from quantisers import SYSTEMS, markdown, of_session

from medusa_deploy.runtime.errors import NumericsError
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.session import load
from medusa_deploy.tools.prompt_source import random_prompts
from support.tiny import VOCAB

TEXTS = [(prompt, prompt[::-1][:12]) for prompt in random_prompts(VOCAB, 256, 6, seed=4)]


def test_the_judge_measures_perplexity_divergence_and_agreement(tmp_path: Path) -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    texts = [([0], [0, 1]), ([1], [0])]
    judge = Judge.write(tmp_path, texts[:1], texts, lambda _prompt, answer: np.log([p] * len(answer)))
    same = judge.of(lambda _prompt, answer: np.log([p] * len(answer)) + 3)
    assert same["kl_nats"] == pytest.approx(0, abs=1e-7)
    assert (same["positions"], same["argmax_agreement"]) == (3, 1)
    other = judge.of(lambda prompt, answer: np.log([p if prompt == [1] else q] * len(answer)))
    assert other["kl_nats"] == pytest.approx(2 / 3 * 0.25 * np.log(2), rel=1e-5)
    assert other["argmax_agreement"] == pytest.approx(1 / 3)
    assert other["perplexity_increase_percent"] == pytest.approx(0, abs=1e-4), "one of two tokens is likelier, one less"
    with pytest.raises(NumericsError, match="NaN"):
        judge.of(lambda _prompt, answer: np.full((len(answer), 3), np.nan))


def test_graphs_of_libraries_are_judged_on_the_same_texts(tiny_bundle: Path, tmp_path: Path) -> None:
    judge = Judge.write(tmp_path, TEXTS[:3], TEXTS[3:], of_session(load(tiny_bundle, variant="cpu", threads=1)))
    graph = Graph(open_bundle(tiny_bundle))
    exact = judge.of(graph.logits(graph.path))
    assert exact["kl_nats"] < 1e-6
    assert exact["argmax_agreement"] == 1
    assert graph.matmuls == 14
    found = {}
    for method in ("static", "4-bit-rtn"):
        quantise(graph, method, judge.calibration, tmp_path / method / "step.onnx", 32)
        found[method] = judge.of(graph.logits(tmp_path / method / "step.onnx"))["kl_nats"]
    assert 1e-6 < found["static"] < found["4-bit-rtn"]


def test_blocks_and_layers_that_are_kept_enter_a_configuration() -> None:
    base = {
        "quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}}]
    }
    made = configured(base, 32, ["down_proj"])
    assert made["quant_cfg"][0]["cfg"]["block_sizes"] == {-1: 32, "type": "static"}
    assert made["quant_cfg"][1] == {"quantizer_name": "*down_proj*", "enable": False}
    assert base["quant_cfg"][0]["cfg"]["block_sizes"][-1] == 128


def test_the_table_has_the_least_divergence_first_and_the_reason_of_failures() -> None:
    entry = {"products": 3, "perplexity_increase_percent": 1.0, "kl_nats": 0.5, "kl_error": 0.1, "argmax_agreement": 0.9}
    systems = {"ort-4-bit-rtn": entry, "ours-4-bit": {**entry, "kl_nats": 0.25}, "ort-4-bit-gptq": {"failed": "out of memory"}}
    lines = markdown({"systems": systems}).splitlines()
    assert [
        SYSTEMS[name].label in line
        for name, line in zip(("ours-4-bit", "ort-4-bit-rtn", "ort-4-bit-gptq"), lines[3:], strict=True)
    ]
    assert "0.2500 ± 0.1000" in lines[3]
    assert "out of memory" in lines[5]
