"""A graph as it is holds one piece of one product's fp32 weight at a time, and computes what it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from medusa_deploy.export.proof.linked_check import frugal_options
from medusa_deploy.export.proof.run_order import run_matmuls_in_turn

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


@pytest.fixture
def branching(tmp_path: Path) -> Path:
    """Two products with one weight outside, one of them in a branch; the weight is also looked up as a table."""
    rng = np.random.default_rng(0)
    offset = 96
    table = rng.normal(0, 0.2, (3 * WIDTH, WIDTH)).astype(np.float16)
    (tmp_path / "weights.bin").write_bytes(b"\xff" * offset + table.tobytes())
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT16, dims=table.shape)
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", offset), ("length", table.nbytes)):
        weight.external_data.add(key=key, value=str(value))
    kind = onnx.TensorProto.FLOAT16
    inner = helper.make_tensor_value_info("inner", kind, [1, 3 * WIDTH])
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "t"], ["inner"], name="inner")], "then", [], [inner])
    same = helper.make_node("Identity", ["outer"], ["same"])
    other = helper.make_graph([same], "else", [], [helper.make_tensor_value_info("same", kind, [1, 3 * WIDTH])])
    nodes = [
        helper.make_node("Gather", ["w", "row"], ["x"], axis=0),
        helper.make_node("Transpose", ["w"], ["t"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["outer"], name="outer"),
        helper.make_node("If", ["wanted"], ["chosen"], then_branch=branch, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("row", onnx.TensorProto.INT64, [1]),
        helper.make_tensor_value_info("wanted", onnx.TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info(name, kind, [1, 3 * WIDTH]) for name in ("outer", "chosen")]
    graph = helper.make_graph(nodes, "branching", inputs, outputs, [weight])
    path = tmp_path / "branching.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_big_weights_outside_are_multiplied_in_pieces_in_branches_too(branching: Path) -> None:
    def results(wanted: bool) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(str(branching), frugal_options(), providers=["CPUExecutionProvider"])
        outer, chosen = session.run(None, {"row": np.array([7]), "wanted": np.array(wanted)})
        return [np.asarray(outer), np.asarray(chosen)]

    expected = [results(wanted) for wanted in (True, False)]
    piece_bytes = 2 * WIDTH * 40  # rows of 96: 40, 40 and 16
    run_matmuls_in_turn(branching, piece_bytes)
    np.testing.assert_array_equal([results(wanted) for wanted in (True, False)], expected)
    graph = onnx.load(branching, load_external_data=False).graph
    branch = helper.get_node_attr_value(graph.node[-1], "then_branch")
    pieces = {tensor.name: list(tensor.dims) for tensor in graph.initializer if tensor.name != "w"}
    assert list(pieces.values()) == [[40, WIDTH], [40, WIDTH], [16, WIDTH]]
    for each in (graph, branch):
        assert [node.input[0] for node in each.node if node.op_type == "Transpose"] == list(pieces)


def test_weights_are_converted_one_product_at_a_time(chain: Path) -> None:
    expected, before = run(chain)
    assert run_matmuls_in_turn(chain) == PRODUCTS
    result, after = run(chain)
    assert (before, after) == (PRODUCTS, 1)
    np.testing.assert_array_equal(result, expected)
