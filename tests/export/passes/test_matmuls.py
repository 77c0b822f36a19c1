"""Which constant matrix a node multiplies with, however it stands in the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medusa_deploy.export.passes.matmuls import constant_matrix, find_matmuls  # noqa: E402

W = np.random.default_rng(0).normal(0, 1, (4, 6)).astype(np.float32)
TURNED = np.ascontiguousarray(W.T)
TURN = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])


def graph_of(nodes: list[Any], **weights: np.ndarray) -> Any:
    """A graph of these nodes over ``x`` and ``other``; its last node makes ``y``."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "other")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph(nodes, "one", inputs, outputs, tensors), ir_version=10)
    return ir.from_proto(model)


def concat(axis: int) -> Any:
    return helper.make_node("Concat", ["w", "v"], ["c"], axis=axis)


@pytest.mark.parametrize(
    ("nodes", "weights", "parts", "transposed"),
    [
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W}, ["w"], False),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W.astype(np.float16)}, ["w"], False),
        ([TURN, helper.make_node("MatMul", ["x", "t"], ["y"])], {"w": TURNED}, ["w"], True),
        ([helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": W}, ["w"], False),
        ([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": TURNED}, ["w"], True),
        ([TURN, helper.make_node("Gemm", ["x", "t"], ["y"], transB=1)], {"w": W}, ["w"], False),
        ([concat(1), helper.make_node("MatMul", ["x", "c"], ["y"])], {"w": W, "v": W}, ["w", "v"], False),
        (
            [
                concat(0),
                helper.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),
                helper.make_node("MatMul", ["x", "t"], ["y"]),
            ],
            {"w": TURNED, "v": TURNED},
            ["w", "v"],
            True,
        ),
    ],
)
def test_a_constant_matrix_is_found(nodes: list[Any], weights: dict[str, np.ndarray], parts: list[str], transposed: bool) -> None:
    model = graph_of(nodes, **weights)
    found = constant_matrix(list(model.graph)[-1])
    assert found is not None
    assert ([part.name for part in found.parts], found.transposed) == (parts, transposed)
    assert (found.turn is not None) == any(node.op_type == "Transpose" for node in nodes)
    if nodes[-1].op_type == "MatMul" and weights["w"].dtype == np.float32:
        (matmul,) = find_matmuls(model)
        whole = np.concatenate([TURNED] * len(parts))
        assert matmul.shape == whole.shape
        np.testing.assert_array_equal(matmul.matrix(), whole)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([helper.make_node("MatMul", ["x", "other"], ["y"])], {}),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 6), np.int32)}),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W[None]}),
        ([helper.make_node("Add", ["x", "w"], ["y"])], {"w": W}),
        ([concat(0), helper.make_node("MatMul", ["x", "c"], ["y"])], {"w": W, "v": W}),
        ([helper.make_node("Concat", ["w", "other"], ["c"], axis=1), helper.make_node("MatMul", ["x", "c"], ["y"])], {"w": W}),
    ],
    ids=["two activations", "integers", "three axes", "a sum", "along the inputs", "one part is computed"],
)
def test_other_operands_are_none(nodes: list[Any], weights: dict[str, np.ndarray]) -> None:
    assert constant_matrix(list(graph_of(nodes, **weights).graph)[-1]) is None
