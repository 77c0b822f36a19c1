"""Which matmuls of a step graph are found, in whatever way their weights stand, and what scales those have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medusa_deploy.calibration.int8.matmuls import Matmul, StepGraph  # noqa: E402
from medusa_deploy.runtime.errors import BundleIntegrityError  # noqa: E402
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle, record_files  # noqa: E402
from support.records import write_stub_bundle  # noqa: E402

IN, OUT = 3, 5
WEIGHT = np.random.default_rng(0).normal(0, 1, (IN, OUT)).astype(np.float32)


def bundle_of(folder: Path, content: bytes) -> Bundle:
    """A stub bundle whose standard graph is ``content``."""
    manifest = open_bundle(write_stub_bundle(folder)).manifest
    (folder / manifest.variants["standard"]).write_bytes(content)
    (folder / "manifest.json").write_text(replace(manifest, files=record_files(folder)).to_json(), "utf-8")
    return open_bundle(folder)


def graph_of(folder: Path, nodes: list[Any], weights: dict[str, np.ndarray], external: str | None = None) -> StepGraph:
    """A graph of these nodes, with the weights in a file of the bundle where ``external`` names one."""
    tensors, data = [], b""
    for name, array in weights.items():
        tensor = numpy_helper.from_array(array, name)
        if external is not None:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", external), ("offset", len(data)), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            data += array.tobytes()
        tensors.append(tensor)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "other")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in ("next_token", "candidates")]
    graph = helper.make_graph(nodes, "step", inputs, outputs, tensors)
    bundle = bundle_of(folder, helper.make_model(graph).SerializeToString())
    if external == "weights.bin":
        (folder / "onnx" / external).write_bytes(data)
        (folder / "manifest.json").write_text(replace(bundle.manifest, files=record_files(folder)).to_json(), "utf-8")
        bundle = open_bundle(folder)
    return StepGraph(bundle)


NODES = [
    helper.make_node("MatMul", ["x", "plain"], ["a"], "plain_product"),
    helper.make_node("Transpose", ["turned"], ["back"], "turn", perm=[1, 0]),
    helper.make_node("MatMul", ["x", "back"], ["b"], "turned_product"),
    helper.make_node("Gemm", ["x", "turned"], ["c"], "gemm", transB=1),
    helper.make_node("MatMul", ["x", "other"], ["d"], "of_two_activations"),
    helper.make_node("MatMul", ["x", "whole"], ["e"], "of_integers"),
    helper.make_node("ArgMax", ["a"], ["next_token"], "argmax"),
    helper.make_node("ArgMax", ["b"], ["candidates"], "of_heads"),
]
WEIGHTS = {"plain": WEIGHT, "turned": np.ascontiguousarray(WEIGHT.T), "whole": np.ones((IN, OUT), np.int32)}


@pytest.mark.parametrize("external", [None, "weights.bin"])
def test_products_are_found_however_their_weights_stand_and_have_equal_scales(external: str | None, tmp_path: Path):
    graph = graph_of(tmp_path, NODES, WEIGHTS, external)
    assert graph.matmuls == [
        Matmul("plain_product", "x", "plain", 1, IN, of_heads=False),
        Matmul("turned_product", "x", "turned", 0, IN, of_heads=True),
        Matmul("gemm", "x", "turned", 0, IN, of_heads=True),
    ]
    expected = np.abs(WEIGHT).max(0) / np.float32(127)
    for matmul in graph.matmuls:
        assert graph.weight_scales(matmul.weight, matmul.axis).tolist() == expected.tolist()


def test_half_precision_weights_have_float32_scales(tmp_path: Path):
    graph = graph_of(tmp_path, NODES[:1], {"plain": WEIGHT.astype(np.float16)})
    scales = graph.weight_scales("plain", 1)
    assert scales.dtype == np.float32
    assert scales.tolist() == (np.abs(WEIGHT.astype(np.float16)).max(0).astype(np.float32) / np.float32(127)).tolist()


def test_further_outputs_are_added_once_and_the_graph_stays_as_it_was(tmp_path: Path):
    graph = graph_of(tmp_path, NODES, WEIGHTS)
    for _ in range(2):
        changed = onnx.load_from_string(graph.with_outputs(["x", "next_token", "b"]))
        assert [output.name for output in changed.graph.output] == ["next_token", "candidates", "x", "b"]


def test_graphs_and_weights_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(BundleIntegrityError, match="no ONNX graph"):
        StepGraph(bundle_of(tmp_path / "a", b"not a graph"))
    graph = graph_of(tmp_path / "b", NODES, WEIGHTS, external="../../outside.bin")
    with pytest.raises(BundleIntegrityError, match="outside the bundle"):
        graph.weight_scales("plain", 1)
