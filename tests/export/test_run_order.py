"""A graph as it is holds one product's fp32 weight at a time, and computes what it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from medusa_deploy.export.linked_check import frugal_options
from medusa_deploy.export.run_order import run_products_in_turn

PRODUCTS = 5
WIDTH = 32


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Products with transposed fp16 weights, one after another."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for number in range(PRODUCTS):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float16), f"w{number}"))
        nodes.append(helper.make_node("Transpose", [f"w{number}"], [f"t{number}"], name=f"t{number}", perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [value, f"t{number}"], [f"y{number}"], name=f"y{number}"))
        nodes.append(helper.make_node("Sigmoid", [f"y{number}"], [f"s{number}"], name=f"s{number}"))
        value = f"s{number}"
    kind = onnx.TensorProto.FLOAT16
    ends = [[helper.make_tensor_value_info(name, kind, [1, WIDTH])] for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", ends[0], ends[1], weights)
    path = tmp_path / "chain.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def run(path: Path) -> tuple[np.ndarray, int]:
    """The result, and how many weights were converted and not multiplied yet at most."""
    options = frugal_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.linspace(-1, 1, WIDTH, dtype=np.float16)[None]})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    alive = most = 0
    for event in sorted(kernels, key=lambda event: event["ts"]):
        alive += {"Transpose": 1, "MatMul": -1}.get(event["args"]["op_name"], 0)
        most = max(most, alive)
    return result, most


def test_weights_are_converted_one_product_at_a_time(chain: Path) -> None:
    expected, before = run(chain)
    assert run_products_in_turn(chain) == PRODUCTS
    result, after = run(chain)
    assert (before, after) == (PRODUCTS, 1)
    np.testing.assert_array_equal(result, expected)
